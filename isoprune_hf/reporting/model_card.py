"""Build the model card of a folder; call `build_model_card`.

All figures are read from the files of the folder; figures that it does not contain are omitted.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from isoprune_hf.checkpoint.needed import NEEDED
from isoprune_hf.checkpoint.stock import isoprune_fields
from isoprune_hf.errors import CheckpointError
from isoprune_hf.plain_files import read_json
from isoprune_hf.pruning.plan import PLAN_FILE
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PruneRecipe
from isoprune_hf.recipes.named import named_settings
from isoprune_hf.reporting.benchmark import benchmark_table
from isoprune_hf.reporting.card_metadata import License, describe_model
from isoprune_hf.reporting.card_usage import describe_usage
from isoprune_hf.reporting.decision_text import describe_decision
from isoprune_hf.reporting.places import show_note, show_place
from isoprune_hf.reporting.plain_text import plain_markdown
from isoprune_hf.reporting.speed_picture import SPEED_PICTURE
from isoprune_hf.reporting.tables import COLUMNS, Metrics, are_measured, describe_sample, format_figure, on_same_images
from isoprune_hf.reporting.widths import PICTURE
from isoprune_hf.tasks.registry import task_named

_TEMPLATE = Path(__file__).with_name("card_template.md")
_STAGES = ("base", "pruned", "finetuned")
_COLUMNS = {
    **COLUMNS,
    "params": "params (M)",
    "latency_ms": "latency (ms)",
    "images": "images",
    "file_mb": "weights (MB)",
}
_HASHED = ("model.safetensors", "pruning_plan.json", "modeling_isoprune.py")
_MARK = "<!-- written by isoprune_hf from the files of this folder, and again when it is pushed unedited: {digest} -->"
_MAX_NAMED_CLASSES = 20
_SECTIONS = {"prune": PruneRecipe, "data": DataRecipe, "finetune": FinetuneRecipe}
_LIBRARIES = ("isoprune-hf", "torch", "transformers", "timm", "torchvision", "torch-pruning", "huggingface_hub")


@dataclass(frozen=True)
class _Files:
    """The content of the files of a folder that a card is built from."""

    folder: Path
    config: dict[str, Any]
    metrics: Metrics
    speed: dict[str, Any]
    plan: dict[str, Any]

    @property
    def stage(self) -> str:
        return str(self.config.get("stage", "base"))

    @property
    def recipe(self) -> dict[str, Any]:
        return self.config.get("recipe") or {}


def build_model_card(folder: str | Path, *, repo: str | None = None, base_license: License | None = None) -> ModelCard:
    """Build the card of a pruned model from the files of its folder.

    Its last line has a digest by which `is_unedited` recognises it.

    Args:
        folder: Folder of a pruned model.
        repo: `user/name` that the code examples open; without it they open the name of the folder.
        base_license: Licence of the base on the Hub; by default that which timm records, if any.

    Raises:
        CheckpointError: The folder is not that of a pruned model, or one of its JSON files is damaged.
    """
    files = _read_files(Path(folder))
    name = repo or files.folder.resolve().name
    data = files.recipe.get("data") or {}
    decision = describe_decision(
        plain_markdown(files.recipe.get("prune") or {}),
        plain_markdown(files.plan.get("settings") or {}),
        plain_markdown(data.get("train_split")) if data.get("dataset") else None,
    )
    metadata = describe_model(
        files.config,
        files.metrics.get(files.stage) or {},
        title=name.rpartition("/")[2],
        is_isomorphic=decision.is_isomorphic,
        base_license=base_license,
    )
    card: ModelCard = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        name=str(plain_markdown(name)).replace('"', "'"),
        decision=decision,
        show=show_place,
        transformers_needed=NEEDED,
        versions=_list_versions(),
        **_describe_files(files),
        **_describe_results(files),
    )
    card.text = card.text.rstrip() + "\n\n"
    card.text += _MARK.format(digest=_digest(str(card)))
    return card


def is_unedited(card: str) -> bool:
    """Return whether a card is one of `build_model_card` as it was written, so that it may be built again."""
    text, _, mark = card.rstrip("\n").rpartition("\n\n")
    return mark == _MARK.format(digest=_digest(f"{text}\n\n"))


def _read_files(folder: Path) -> _Files:
    read = _read_json(folder / "config.json")
    config = isoprune_fields(read)
    stage = (config or {}).get("stage", "base")
    if config is None or stage not in _STAGES:
        kind = read.get("model_type")
        raise CheckpointError(f"config.json: not a pruned model (model_type {kind!r}, stage {stage!r})")
    metrics, speed, plan = (
        _read_json(folder / file) if (folder / file).exists() else {}
        for file in ("metrics.json", "speed.json", PLAN_FILE)
    )
    return _Files(folder, config, metrics, speed, plan)


def _describe_files(files: _Files) -> dict[str, Any]:
    """Return the variables of the template that describe the folder: config, plan, usage, digests."""
    folder, config = files.folder, files.config
    task = task_named(config.get("base"), config.get("problem_type"))
    return {
        "config": plain_markdown(config),
        "stage": files.stage,
        "source": plain_markdown(config.get("source") or {}),
        "base": plain_markdown(config.get("base") or {}),
        "needs_timm": _needs_timm(config.get("base") or {}),
        "recipe": {key: plain_markdown(files.recipe.get(key) or {}) for key in ("prune", "data", "finetune")},
        "commands": _commands(files.recipe, files.stage),
        "notes": [show_note(note) for note in files.plan.get("notes") or ()],
        "labels": _name_labels(config.get("id2label") or {}),
        "has_picture": (folder / PICTURE).is_file(),
        "speed_picture": SPEED_PICTURE if (folder / SPEED_PICTURE).is_file() else None,
        "reads_arrays": _reads_arrays(config, folder / "preprocessor_config.json"),
        **describe_usage(folder, config),
        "form": task.form,
        "wording": task.wording,
        "hashes": {file: _digest_of(folder / file) for file in _HASHED if (folder / file).is_file()},
    }


def _describe_results(files: _Files) -> dict[str, Any]:
    """Return the variables of the template that are figures: cost, accuracy, times."""
    metrics, speed, cost = files.metrics, files.speed, files.config.get("cost") or {}
    last = _last_figures(metrics, files.stage)
    shown = on_same_images(metrics, last)
    weights = files.folder / "model.safetensors"
    size = weights.stat().st_size / 1e6 if weights.is_file() else None
    return {
        "saved": _compare(cost),
        "sample": describe_sample(shown.values()),
        "is_measured": are_measured(shown.values()),
        "split": plain_markdown(last.get("split")),
        "is_held_out": "holdout_seed" in last,
        "left_out": [name for name in _STAGES if metrics.get(name) and name not in shown],
        "table": _tabulate(cost, shown, speed.get("milliseconds") or {}, files.stage, size),
        "speed": plain_markdown(speed),
        "benchmark": plain_markdown(speed.get("benchmark")),
        "timings": plain_markdown(benchmark_table(speed["benchmark"])) if speed.get("benchmark") else [],
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reads_arrays(config: dict[str, Any], file: Path) -> bool:
    """Return whether a pipeline needs arrays: it turns files into RGB, which only an own processor turns into grey."""
    channels = (config.get("image_size") or [3])[0]
    is_own = not file.is_file() or "image_processor_type" not in _read_json(file)
    return bool(channels != 3 and not (channels == 1 and is_own))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing; a card is built from the folder of a pruned model") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: must contain a JSON object, got {type(value).__name__}")
    return value


def _commands(recipe: dict[str, Any], stage: str) -> list[str]:
    """Return the commands that produce this model, with the settings that differ from the defaults."""
    stages = [("prune", ["prune", "data"])] if (recipe.get("prune") or {}).get("model") else []
    if stage == "finetuned" and recipe.get("finetune"):
        stages.append(("finetune --model output/pruned", ["data", "finetune"]))
    return [
        " ".join([f"isoprune {name}", *(flag for section in sections for flag in _flags(section, recipe))])
        for name, sections in stages
    ]


def _flags(section: str, recipe: dict[str, Any]) -> list[str]:
    named = named_settings(_SECTIONS[section], recipe.get(section) or {}, has_images=bool(recipe.get("data")))
    found = []
    for key, value in named.items():
        shown = show_place(value)
        text = value if isinstance(value, str) else json.dumps(value)
        text = "LOCAL" if shown != plain_markdown(text) else " ".join(text.replace("`", "'").split())
        found.append(f"--{section}.{key} {shlex.quote(text)}")
    return found


def _name_labels(labels: dict[str, str]) -> str:
    names = [labels[key] for key in sorted(labels, key=int)]
    more = (
        f" and {len(names) - _MAX_NAMED_CLASSES:,} more, all in config.json" if len(names) > _MAX_NAMED_CLASSES else ""
    )
    shown = [plain_markdown(name) for name in names[:_MAX_NAMED_CLASSES]]
    return ("; " if any("," in name for name in shown) else ", ").join(shown) + more


def _last_figures(metrics: Metrics, stage: str) -> dict[str, Any]:
    """Return the figures of the model, or of the latest stage before it that has any."""
    stages = _STAGES[_STAGES.index(stage) :: -1] + _STAGES[::-1]
    return next((dict(metrics[name]) for name in stages if metrics.get(name)), {})


def _tabulate(
    cost: dict[str, Any], metrics: dict[str, Any], latency: dict[str, float], stage: str, size: float | None
) -> list[list[str]]:
    names = [name for name in _STAGES if metrics.get(name) or _STAGES.index(name) <= _STAGES.index(stage)]
    sizes = {name: cost.get("base" if name == "base" else "pruned") or {} for name in names}
    rows = {name: {**sizes[name], **(metrics.get(name) or {}), "latency_ms": latency.get(name)} for name in names}
    if stage in rows:
        rows[stage]["file_mb"] = size
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows.values())]
    body = [
        [name, *(format_figure(key, row.get(key), "\N{EN DASH}") for key in columns)] for name, row in rows.items()
    ]
    return [["model", *(_COLUMNS[key] for key in columns)], *body]


def _compare(cost: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Return (before, after, percent removed) for macs and params, or nothing if a size is not known."""
    base, pruned = cost.get("base") or {}, cost.get("pruned") or {}
    if not all(side.get(key) for side in (base, pruned) for key in ("macs", "params")):
        return {}
    cut = {key: f"{100 * (1 - pruned[key] / base[key]):.1f}" for key in ("macs", "params")}
    return {key: (format_figure(key, base[key]), format_figure(key, pruned[key]), cut[key]) for key in cut}


def _list_versions() -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _needs_timm(base: Mapping[str, Any]) -> bool:
    """Return whether a base, or the backbone of a detector, is built by timm."""
    backbone = (base.get("config") or {}).get("backbone_config") or {}
    return base.get("library") == "timm" or backbone.get("model_type") == "timm_backbone"
