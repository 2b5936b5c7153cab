"""Compare the outputs of an exported model with those of PyTorch: `compare_outputs`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from isoprune_hf.errors import ExportError
from isoprune_hf.export.formats import FORMATS, Format
from isoprune_hf.export.values import LOGITS, ExportPrecision

# Largest difference of two outputs, as a fraction of the largest one: other kernels add in another order, and fewer
# bits are coarse.
_MAX_DIFFERENCE: dict[ExportPrecision, float] = {
    "fp32": 1e-3,
    "fp16": 0.02,
    "bf16": 0.1,
    "int8": 0.25,
    "int8-dynamic": 0.25,
}


class Export(NamedTuple):
    """An exported model, and how its outputs differ from those of PyTorch.

    Args:
        file: Name of the model's file in its folder.
        difference: Largest difference of two entries over all images and batches; None if they were not compared.
        largest: Largest absolute entry of PyTorch; None if they were not compared.
        batches: Number of images in each batch that was compared.
        same_class: Number of images with the same predicted class; None for a model without classes.
        takes_batches: Whether the file takes any number of images at once; otherwise it takes one.
        quantization: How the model was quantised; empty if there is nothing to say.
        limitation: Why this machine could not run and compare the model; None if it was compared.
        outputs: Names of the outputs.
    """

    file: str
    difference: float | None
    largest: float | None
    batches: tuple[int, ...]
    same_class: int | None
    takes_batches: bool
    quantization: Mapping[str, Any] = MappingProxyType({})
    limitation: str | None = None
    outputs: tuple[str, ...] = LOGITS


def without_comparison(target: Format, outputs: tuple[str, ...] = LOGITS) -> Export:
    """Describe an exported model that this machine cannot run."""
    form = FORMATS[target]
    same = 0 if outputs == LOGITS else None
    return Export(form.file, None, None, (), same, form.takes_batches, {}, form.limitation, outputs)


def compare_outputs(
    expected: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    *,
    target: Format,
    precision: ExportPrecision,
    outputs: tuple[str, ...] = LOGITS,
    has_classes: bool = True,
) -> Export:
    """Compare the outputs of an exported model, batch by batch.

    Args:
        expected: Outputs of PyTorch for each batch, (B, classes) or as `side_by_side` returns several.
        found: Outputs of the exported model.
        target: Format of the exported model.
        precision: Its precision.
        outputs: Names of the outputs.
        has_classes: They are logits of classes.

    Raises:
        ExportError: Shapes differ, or an entry differs by more than 0.1 % of the largest one (fp16: 2 %, bf16: 10 %,
            eight bits: 25 %).
    """
    shapes = [array.shape for array in found]
    if shapes != [array.shape for array in expected]:
        raise ExportError(
            f"the model in {target} returns outputs of the shapes {shapes}, not {[array.shape for array in expected]}"
        )
    reference, answer = np.concatenate(expected), np.concatenate(found)
    difference = float(abs(answer - reference).max())
    largest = float(abs(reference).max())
    limit = _MAX_DIFFERENCE[precision] * largest
    if not difference <= limit:  # also true for NaN
        advice = "try --precision fp32" if precision != "fp32" else "no file is kept"
        raise ExportError(
            f"an output of the model in {target} differs from PyTorch by {difference:.3g}, at most {limit:.3g} is "
            f"allowed; {advice}"
        )
    same = int((reference.argmax(1) == answer.argmax(1)).sum()) if has_classes else None
    batches, form = tuple(len(array) for array in expected), FORMATS[target]
    return Export(form.file, difference, largest, batches, same, form.takes_batches, outputs=outputs)
