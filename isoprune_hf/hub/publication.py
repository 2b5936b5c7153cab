"""Prepare the files of a folder for the Hub: call `prepare_files`.

The folder itself stays as it is. What is sent differs from it in three ways: no file holds a path of this machine, a
card that nobody edited is built again for the repository, and figures of a data set of the Hub are also written for
its leaderboard.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import eval_result_entries_to_yaml

from isoprune_hf.checkpoint.stock import ENTRY, isoprune_fields
from isoprune_hf.plain_files import read_json, read_text
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan
from isoprune_hf.reporting.card_metadata import License, list_benchmark_entries
from isoprune_hf.reporting.model_card import build_model_card, is_unedited
from isoprune_hf.reporting.places import hide_note, hide_paths, hide_places

CARD = "README.md"
_SETTINGS = ("source", "recipe")  # of a config: what was named, among others by path
_LABELS = ("id2label", "label2id")  # texts of the data set, such as /m/01g317, that name classes and no files


@dataclass(frozen=True)
class Prepared:
    """A file as it is sent.

    Args:
        name: Path in the repository.
        content: The file of the folder, or other content.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """The size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def prepare_files(
    folder: Path, repo: str, files: Sequence[Path], *, base_license: License | None = None
) -> list[Prepared]:
    """Return the files of a folder as they are sent, by name.

    Args:
        folder: Folder of a pruned model.
        repo: `user/name`.
        files: Its files that are sent.
        base_license: Licence of the base on the Hub.

    Raises:
        CheckpointError: A file that the card is built from is damaged.
    """
    changed = {path.name: text for path in files if (text := _hide(path)) is not None}
    config = isoprune_fields(read_json(folder / "config.json")) or {}
    card = folder / CARD
    if card not in files or is_unedited(read_text(card)):
        changed[CARD] = _build_card(folder, repo, changed, base_license)
    names = {path.name: path for path in files} | {CARD: card}
    prepared = [
        Prepared(name, changed[name].encode() if name in changed else path) for name, path in sorted(names.items())
    ]
    metrics = read_json(folder / "metrics.json") if folder / "metrics.json" in files else {}
    entries = list_benchmark_entries(config, metrics.get(config.get("stage", "base")) or {})
    for entry in entries:
        content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        prepared.append(Prepared(f".eval_results/{entry.dataset_id.rpartition('/')[2]}.yaml", content.encode()))
    return prepared


def _hide(path: Path) -> str | None:
    """Return the text of a JSON file without the paths that it holds; None for a file without any."""
    if path.suffix != ".json":
        return None
    values = read_json(path)
    if path.name == PLAN_FILE:
        return _hide_in_plan(path, values)
    hidden = _hide_in_values(values)
    return None if hidden == values else json.dumps(hidden, indent=2, sort_keys=True) + "\n"


def _hide_in_plan(path: Path, values: Any) -> str | None:
    notes, settings = values.get("notes") or [], values.get("settings") or {}
    hidden = [hide_note(note) for note in notes], hide_paths(settings)
    if hidden == (notes, settings):
        return None
    return replace(PruningPlan.load(path), notes=tuple(hidden[0]), settings=hidden[1]).to_json()


def _hide_in_values(values: Any) -> Any:
    if not isinstance(values, dict):
        return hide_paths(values)
    kept = {name: values[name] for name in _LABELS if name in values}
    named = {name: hide_places(values[name]) for name in _SETTINGS if name in values}
    inner = {ENTRY: _hide_in_values(values[ENTRY])} if ENTRY in values else {}
    return {**hide_paths(values), **kept, **named, **inner}


def _build_card(folder: Path, repo: str, changed: dict[str, str], base_license: License | None) -> str:
    """Build the card from the files as they are sent, so that its digests and settings are theirs."""
    with tempfile.TemporaryDirectory() as place:
        for path in folder.iterdir():
            if path.is_file() and path.name not in changed:
                (Path(place) / path.name).symlink_to(path.resolve())
        for name, text in changed.items():
            (Path(place) / name).write_bytes(text.encode())
        return str(build_model_card(place, repo=repo, base_license=base_license))
