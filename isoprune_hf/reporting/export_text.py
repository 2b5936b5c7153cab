"""Describe an exported model for a terminal: `describe_export`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoprune_hf.export.comparison import Export
from isoprune_hf.export.sensitivity import DISTANCE, DIVERGENCE
from isoprune_hf.export.values import ExportPrecision
from isoprune_hf.reporting.tables import Metrics, results_table


def describe_export(file: Path, target: str, precision: ExportPrecision, exported: Export, metrics: Metrics) -> str:
    """Return what was written, how far its outputs are from those of PyTorch, and the table of its figures."""
    images, quantization = sum(exported.batches), exported.quantization
    lines = [f"{file}: {target}, {precision}, {'any batch size' if exported.takes_batches else 'one image at a time'}"]
    if exported.difference is None:
        lines.append(
            f"not compared with PyTorch: {exported.limitation}; inputs, outputs, labels and weights were checked"
        )
    else:
        names = " and ".join(exported.outputs)
        same = None if exported.same_class is None else f"; the same class for {exported.same_class} of {images}"
        lines.append(
            f"largest difference to PyTorch: {exported.difference:.3g}, {names} up to {exported.largest:.3g} "
            f"({images} pictures in batches of {' and '.join(map(str, exported.batches))}){same or ''}"
        )
    if quantization:
        lines.append(describe_quantization(quantization))
    if metrics:
        lines += ["", results_table(metrics, has_details=True)]
    return "\n".join(lines)


def describe_quantization(record: Mapping[str, Any]) -> str:
    """Return in one sentence which layers stayed in fp32 and why, and the effect of quantising the others.

    Args:
        record: The entry `quantization` of `export.json`.
    """
    harm = DIVERGENCE if DIVERGENCE.key in record else DISTANCE
    always = record.get("always_out", [])  # files of earlier versions do not tell these layers from the measured ones
    measured = [name for name in record["left_out"] if name not in always]
    reasons = [(always, "always in fp32 in this format"), (measured, "which changed the outputs most")]
    parts = [f"{', '.join(names)}, {reason}," for names, reason in reasons if names]
    kept = f"all layers but {' and '.join(parts)}" if parts else "all layers"
    return (
        f"{kept} in eight bits ({record['share_of_weights']:.0%} of the weights), ranges of "
        f"{record['calibration_images']:,} training images; on {record['held_out_images']} others "
        f"{harm.text.format(format(record[harm.key], '.3g'))}"
    )
