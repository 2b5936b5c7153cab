"""Build the card of the folder of an exported model from its files: `build_export_card`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from isoprune_hf.errors import CheckpointError
from isoprune_hf.plain_files import read_json, read_text
from isoprune_hf.reporting.card_metadata import describe_model
from isoprune_hf.reporting.export_text import describe_quantization
from isoprune_hf.reporting.places import show_place
from isoprune_hf.reporting.plain_text import plain_markdown
from isoprune_hf.reporting.tables import TASK_COLUMNS, Figures, Metrics, describe_sample, format_figure

_TEMPLATE = Path(__file__).with_name("export_card.md")
_COLUMNS = {
    **TASK_COLUMNS,
    "agreement": "agreement %",
    "file_mb": "MB",
    "images": "images",
}
_RUNTIMES = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "torch-export": "torch",
    "executorch": "executorch",
    "litert": "ai-edge-litert",
    "coreml": "coremltools",
}


def build_export_card(folder: Path, *, name: str) -> ModelCard:
    """Build the card of an exported model.

    Args:
        folder: Its folder.
        name: Name of the model.

    Raises:
        CheckpointError: A file of the folder is missing or damaged.
    """
    config, record = _read(folder / "config.json"), _read(folder / "export.json")
    metrics: Metrics = _read(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    row: Figures = next((figures for name, figures in metrics.items() if "+" in name), {})
    # Figures of both rows: the others compare the exported model with the one in PyTorch.
    plain = next((figures for name, figures in metrics.items() if "+" not in name), {})
    figures = {key: value for key, value in row.items() if key in plain}
    metadata = describe_model(config, figures, title=name, is_isomorphic=False, base_license=None)
    metadata.library_name = _RUNTIMES.get(str(record["format"]))
    metadata.tags = [*(metadata.tags or []), str(record["format"]), str(record["precision"])]
    outputs = record.get("outputs", ["logits"])
    script = "classify.py" if (folder / "classify.py").is_file() else "extract.py"
    source = config.get("source") or {}
    has_code = (folder / "image_processing_isoprune.py").is_file()  # otherwise it is a processor of transformers
    card: ModelCard = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        name=str(plain_markdown(name)),
        origin=show_place(source.get("name") or (config.get("base") or {}).get("architecture") or "an unnamed base"),
        stage=config.get("stage", "base"),
        saved=_describe_cost(config.get("cost") or {}),
        record=plain_markdown(record),
        outputs=[str(plain_markdown(name)) for name in outputs],
        has_classes=record.get("same_class") is not None,
        quantization=plain_markdown(describe_quantization(record["quantization"])) if record["quantization"] else None,
        table=_tabulate(metrics),
        split=plain_markdown(row.get("split")),
        sample=describe_sample(metrics.values()),
        packages=f"{_RUNTIMES.get(str(record['format']))} transformers pillow{'' if has_code else ' torchvision'}",
        has_code=has_code,
        script_file=script,
        script=read_text(folder / script),
    )
    return card


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file.name}: must contain a JSON object")
    return values


def _describe_cost(cost: Mapping[str, Any]) -> str | None:
    """Return the MACs before and after pruning in one sentence; None for a base."""
    base, pruned = cost.get("base") or {}, cost.get("pruned") or {}
    if not (base.get("macs") and pruned.get("macs")):
        return None
    before, after = (format_figure("macs", side["macs"]) for side in (base, pruned))
    return f"Pruning left {after} of {before} GMACs."


def _tabulate(metrics: Metrics) -> list[list[str]]:
    """Return the rows of the table, its heading first; nothing without figures."""
    if not metrics:
        return []
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in metrics.values())]
    ordered = sorted(metrics, key=lambda name: "+" in name)
    rows = [[name, *(format_figure(key, _number(metrics[name].get(key)), "-") for key in columns)] for name in ordered]
    return [["model", *(_COLUMNS[key] for key in columns)], *rows]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None
