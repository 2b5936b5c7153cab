"""The pruning plan as a value: `PruningPlan` is saved as JSON, and every entry is checked when it is read."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from isoprune_hf.errors import CheckpointError
from isoprune_hf.plain_files import parse_json, read_text

PLAN_FILE = "pruning_plan.json"
PLAN_VERSION = 1
_MAX_NAMES = 3  # in a note, for each reason


@dataclass(frozen=True)
class PruningPlan:
    """The channels, heads and blocks that a cut keeps; can be saved, compared and replayed.

    Args:
        kept: Group -> channels to keep, ascending; groups that are not cut are missing.
        heads: Attention group -> heads to keep, ascending.
        removed_blocks: Residual blocks to remove, with all their groups.
        margins: First group of a scope -> the highest removed score (`removed`) and the lowest kept one (`kept`),
            before widths were rounded. With a small gap, other images could lead to another plan.
        notes: Lines for the user: parts that a step left as they were (`note_left`), widths that could not be aligned,
            a budget that is not used up.
        achieved: `{"base": {"macs", "params"}, "pruned": {...}}`; a latency budget adds `latency_ms`.
        settings: The settings that the plan depends on: criterion, scope, ratios, rounding. `transform` has those of
            the images that replace the base's own, such as `image_size`; it is missing if none does.
        fingerprint: Fingerprint of the base weights.
        version: Version of this format.
    """

    kept: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, tuple[int, ...]]
    removed_blocks: tuple[str, ...] = ()
    margins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    achieved: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    version: int = PLAN_VERSION

    def to_json(self) -> str:
        """Return the plan as JSON: sorted and indented, with each list of indices on one line."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True)
        return re.sub(r"\[[\d,\s]*\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Parse a plan that `to_json` wrote, possibly edited by hand.

        Raises:
            CheckpointError: The text is not a plan, has another version, or has an invalid entry.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise CheckpointError(f"pruning plan: not a plan of isoprune_hf ({error})") from error
        version = values.get("version") if isinstance(values, dict) else None
        if type(version) is not int or not {"kept", "heads"} <= values.keys():
            raise CheckpointError("pruning plan: not a plan of isoprune_hf: needs version, kept and heads")
        if version != PLAN_VERSION:
            raise CheckpointError(
                f"pruning plan: version {version}, this code reads {PLAN_VERSION}; update isoprune_hf"
            )
        unknown = values.keys() - {entry.name for entry in fields(cls)}
        if unknown:
            raise CheckpointError(f"pruning plan: unknown entry {sorted(unknown)[0]!r}")
        for key in ("kept", "heads"):
            entries = _read_mapping(values, key, "indices")
            values[key] = {name: _read_indices(f"{key} of {name}", entry) for name, entry in entries.items()}
        for name in values["heads"]:
            if name not in values["kept"]:
                raise CheckpointError(f"pruning plan: heads names {name!r}, which is missing in kept")
        for key in ("margins", "achieved"):
            for name, figures in _read_mapping(values, key, "figures").items():
                _check_figures(f"{key} of {name}", figures)
        _read_mapping(values, "settings", "values")
        for key in ("removed_blocks", "notes"):
            texts = values.get(key, [])
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise CheckpointError(f"pruning plan: {key} must be a list of texts, got {texts!r}")
            values[key] = tuple(texts)
        if not isinstance(values.get("fingerprint", ""), str):
            raise CheckpointError(f"pruning plan: fingerprint must be a text, got {values['fingerprint']!r}")
        return cls(**values)

    @classmethod
    def load(cls, place: str | Path) -> "PruningPlan":
        """Load a plan from its file, or from the folder of a pruned model.

        Raises:
            CheckpointError: The file is missing or not a plan; the message names it.
        """
        path = Path(place)
        if path.is_dir():
            path = path / PLAN_FILE
            if not path.is_file():
                raise CheckpointError(
                    f"plan: {place} has no {PLAN_FILE}; pass a plan, or the folder of a pruned model"
                )
        try:
            return cls.from_json(read_text(path))
        except OSError as error:
            raise CheckpointError(f"plan: {path} cannot be read ({error.strerror})") from error
        except ValueError as error:  # CheckpointError among them
            raise CheckpointError(f"pruning plan {path}: {str(error).removeprefix('pruning plan: ')}") from error


def record_transform(plan: PruningPlan, transform: Mapping[str, Any]) -> PruningPlan:
    """Return a plan that records the settings of the images that replace those of its base.

    Args:
        plan: The plan.
        transform: `DataRecipe.transform`; a plan of the base's own images stays as it is.
    """
    return replace(plan, settings={**plan.settings, "transform": dict(transform)}) if transform else plan


def note_left(action: str, unit: str, reasons: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the note on parts of a model, such as those that a step left as they were; empty if there are none.

    Args:
        action: What happened to the parts, such as `left whole`.
        unit: Kind of the parts, in the singular.
        reasons: Reason -> names of the parts. The note has their number and the first names.
    """
    total = sum(map(len, reasons.values()))
    listed = [
        f"{len(names)}: {reason}: {', '.join(names[:_MAX_NAMES])}{', ...' if len(names) > _MAX_NAMES else ''}"
        for reason, names in reasons.items()
    ]
    return (f"{action}: {total} {unit}{'s' if total > 1 else ''} ({'; '.join(listed)})",) if total else ()


def _check_figures(where: str, figures: Any) -> None:
    if not isinstance(figures, dict):
        raise CheckpointError(f"pruning plan: {where} must map names to figures, got {figures!r}")
    for name, value in figures.items():
        if value is not None and type(value) not in (int, float):
            raise CheckpointError(f"pruning plan: {where}: {name} must be a number, got {value!r}")


def _read_mapping(values: Mapping[str, Any], key: str, content: str) -> dict[str, Any]:
    entry = values.get(key, {})
    if not isinstance(entry, dict):
        raise CheckpointError(f"pruning plan: {key} must map names to {content}, got {entry!r}")
    return entry


def _read_indices(where: str, entry: Any) -> tuple[int, ...]:
    if not isinstance(entry, list) or not entry or any(type(index) is not int or index < 0 for index in entry):
        raise CheckpointError(f"pruning plan: {where} must be a non-empty list of whole numbers from 0")
    if entry != sorted(set(entry)):
        raise CheckpointError(f"pruning plan: {where} must be ascending, each number once")
    return tuple(entry)
