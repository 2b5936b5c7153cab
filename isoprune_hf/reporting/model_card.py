"""Build the model card of a folder; call `build_model_card`.

All figures are read from the files of the folder; figures that it does not contain are omitted.
"""

import hashlib
import json
import re
import shlex
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from isoprune_hf.checkpoint.needed import NEEDED
from isoprune_hf.checkpoint.own_network import inputs_of
from isoprune_hf.checkpoint.stock import isoprune_fields
from isoprune_hf.errors import CheckpointError
from isoprune_hf.plain_files import read_json
from isoprune_hf.pruning.plan import PLAN_FILE
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PruneRecipe, recipe_to_dict
from isoprune_hf.reporting.benchmark import benchmark_table
from isoprune_hf.reporting.plain_text import plain_markdown
from isoprune_hf.reporting.tables import Metrics, describe_sample, format_figure, on_same_images
from isoprune_hf.reporting.widths import PICTURE

_TEMPLATE = Path(__file__).with_name("card_template.md")
_STAGES = ("base", "pruned", "finetuned")
_COLUMNS = {
    "macs": "GMACs",
    "params": "params (M)",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "loss": "loss",
    "latency_ms": "latency (ms)",
    "images": "images",
    "file_mb": "weights (MB)",
}
_HASHED = ("model.safetensors", "pruning_plan.json", "modeling_isoprune.py")
_MAX_NAMED_CLASSES = 20
_SECTIONS = {"prune": PruneRecipe, "data": DataRecipe, "finetune": FinetuneRecipe}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BUILDER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.ASCII)  # of a network of no library
_LIBRARIES = ("isoprune-hf", "torch", "transformers", "timm", "torchvision", "torch-pruning", "huggingface_hub")


def build_model_card(folder: str | Path, *, repo: str | None = None) -> ModelCard:
    """Build the card of a pruned model from the files of its folder.

    Args:
        folder: Folder of a pruned model.
        repo: `user/name` that the code examples open; without it they open the name of the folder.

    Raises:
        CheckpointError: The folder is not that of a pruned model, or one of its JSON files is damaged.
    """
    folder = Path(folder)
    read = _read_json(folder / "config.json")
    config = isoprune_fields(read)
    metrics = _read_json(folder / "metrics.json") if (folder / "metrics.json").exists() else {}
    speed = _read_json(folder / "speed.json") if (folder / "speed.json").exists() else {}
    stage = (config or {}).get("stage", "base")
    if config is None or stage not in _STAGES:
        kind = read.get("model_type")
        raise CheckpointError(f"config.json: not a pruned model (model_type {kind!r}, stage {stage!r})")
    shown = on_same_images(metrics, _last_figures(metrics, stage))
    name = repo or folder.resolve().name
    cost, recipe = config.get("cost") or {}, config.get("recipe") or {}
    hashed = [folder / file for file in _HASHED if (folder / file).is_file()]
    plan = _read_json(folder / PLAN_FILE) if (folder / PLAN_FILE).exists() else {}
    weights = folder / "model.safetensors"
    size = weights.stat().st_size / 1e6 if weights.is_file() else None
    card: ModelCard = ModelCard.from_template(
        _describe(config, recipe.get("data") or {}, metrics.get(stage) or {}, cost, name.rpartition("/")[2]),
        template_path=str(_TEMPLATE),
        name=str(plain_markdown(name)).replace('"', "'"),
        config=plain_markdown(config),
        stage=stage,
        source=plain_markdown(config.get("source") or {}),
        base=plain_markdown(config.get("base") or {}),
        recipe={key: plain_markdown(recipe.get(key) or {}) for key in ("prune", "data", "finetune")},
        saved=_compare(cost),
        sample=describe_sample(shown.values()),
        split=plain_markdown(_last_figures(metrics, stage).get("split")),
        left_out=[name for name in _STAGES if metrics.get(name) and name not in shown],
        table=_tabulate(cost, shown, speed.get("milliseconds") or {}, stage, size),
        commands=_commands(recipe, stage),
        notes=[_show_note(note) for note in plan.get("notes") or ()],
        labels=_name_labels(config.get("id2label") or {}),
        has_picture=(folder / PICTURE).is_file(),
        reads_arrays=_reads_arrays(config, folder / "preprocessor_config.json"),
        builder=_builder(config.get("base") or {}),
        call=None if _has_pipeline(config, folder) else _call(config),
        speed=plain_markdown(speed),
        benchmark=plain_markdown(speed.get("benchmark")),
        timings=plain_markdown(benchmark_table(speed["benchmark"])) if speed.get("benchmark") else [],
        hashes={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in hashed},
        versions=_list_versions(),
        transformers_needed=NEEDED,
        show=_show,
    )
    return card


def _has_pipeline(config: dict[str, Any], folder: Path) -> bool:
    """Return whether `pipeline` opens a folder: it has an image processor and needs no builder."""
    return (folder / "preprocessor_config.json").is_file() and (config.get("base") or {}).get("library") != "python"


def _builder(base: dict[str, Any]) -> dict[str, str] | None:
    """Return module and name of the builder of a network of no library, if they are names."""
    place = base.get("architecture")
    if base.get("library") != "python" or not isinstance(place, str) or not _BUILDER.fullmatch(place):
        return None
    module, _, name = place.partition(":")
    return {"place": place, "module": module, "name": name, "first": name.partition(".")[0]}


def _call(config: dict[str, Any]) -> str:
    """Return the arguments of a call of the network with random inputs."""
    inputs = inputs_of(config.get("base"), config.get("image_size"))
    made = [(name, f"torch.randn({', '.join(map(str, [1, *shape]))})") for name, shape in inputs]
    given = [value for name, value in made if name is None]
    return ", ".join(given + [f"{name}={value}" for name, value in made if name is not None])


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


def _describe(
    config: dict[str, Any], data: dict[str, Any], metrics: dict[str, Any], cost: dict[str, Any], title: str
) -> ModelCardData:
    source, library = config.get("source") or {}, (config.get("base") or {}).get("library")
    base_model = source.get("name") if source.get("pretrained") and _is_hub_id(source.get("name")) else None
    dataset = data.get("dataset")
    known = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("accuracy", "top-5 accuracy"), "loss": ("loss", "loss")}
    figures = {key: metrics[key] for key in known if metrics.get(key) is not None}
    macs = (cost.get("base" if config.get("stage", "base") == "base" else "pruned") or {}).get("macs")
    if figures and macs is not None:
        known["macs"], figures["macs"] = ("macs", "MACs of one image (torch.utils.flop_counter)"), macs
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_show(dataset),
            dataset_name=_show(dataset),
            dataset_split=metrics.get("split", data.get("eval_split")),
            dataset_revision=data.get("revision"),
            metric_type=known[key][0],
            metric_name=known[key][1],
            metric_value=value,
        )
        for key, value in figures.items()
        if dataset is not None
    ]
    return ModelCardData(
        license=_find_license(source, library),
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["isoprune", "isomorphic-pruning", "pruning", *([library] if library else [])],
        base_model=base_model,
        base_model_relation="finetune" if base_model and config.get("stage") == "finetuned" else None,
        datasets=dataset if _is_hub_id(dataset) else None,
        model_name=title,
        eval_results=results or None,
    )


def _find_license(source: dict[str, Any], library: str | None) -> str | None:
    """Return the licence that timm records for the pretrained weights of the base, or None."""
    name = source.get("name")
    if library != "timm" or not source.get("pretrained") or not isinstance(name, str):
        return None
    known = import_module("timm").get_pretrained_cfg(name.removeprefix("timm/"), allow_unregistered=True)
    return getattr(known, "license", None) or None


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
    defaults = recipe_to_dict(_SECTIONS[section]())
    found = []
    for key, value in (recipe.get(section) or {}).items():
        if key in defaults and value != defaults[key]:
            shown = _show(value)
            text = value if isinstance(value, str) else json.dumps(value)
            text = "LOCAL" if shown != plain_markdown(text) else " ".join(text.replace("`", "'").split())
            found.append(f"--{section}.{key} {shlex.quote(text)}")
    return found


def _name_labels(labels: dict[str, str]) -> str:
    names = [labels[key] for key in sorted(labels, key=int)]
    more = (
        f" and {len(names) - _MAX_NAMED_CLASSES:,} more, all in config.json" if len(names) > _MAX_NAMED_CLASSES else ""
    )
    return ", ".join(plain_markdown(name) for name in names[:_MAX_NAMED_CLASSES]) + more


def _is_hub_id(name: Any) -> bool:
    if not isinstance(name, str) or name.startswith("torchvision/"):
        return False
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _show(value: Any) -> str:
    """Return a value as text of a table cell; a path loses all but its last part, because cards are public."""
    text = value if isinstance(value, str) else json.dumps(value)
    parts = re.split(r"[/\\]+", text.rstrip("/\\"))
    if parts != [text] and not isinstance(value, str):
        text = "not shown, because it contains a path"
    elif parts != [text] and parts[0] != "torchvision" and not _is_hub_id(text):
        text = f"a local folder ({parts[-1]})"
    return str(plain_markdown(text))


def _show_note(note: str) -> str:
    """Return a note of a plan on one line; one that holds a path is not shown, because cards are public."""
    return "not shown, because it contains a path" if re.search(r"[/\\\\]", note) else str(plain_markdown(note))


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
