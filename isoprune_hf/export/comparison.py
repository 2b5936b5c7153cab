"""Compare the logits of an exported model with those of PyTorch: `compare_logits`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from isoprune_hf.errors import ExportError
from isoprune_hf.export.formats import FORMATS, Format
from isoprune_hf.export.values import ExportPrecision

# Largest difference of two logits, as a fraction of the largest logit: other kernels add in another order, and fewer
# bits are coarse.
_MAX_DIFFERENCE: dict[ExportPrecision, float] = {
    "fp32": 1e-3,
    "fp16": 0.02,
    "bf16": 0.1,
    "int8": 0.25,
    "int8-dynamic": 0.25,
}


class Export(NamedTuple):
    """An exported model, and how its logits differ from those of PyTorch.

    Args:
        file: Name of the model's file in its folder.
        difference: Largest difference of two logits over all images and batches; None if they were not compared.
        largest: Largest absolute logit of PyTorch; None if they were not compared.
        batches: Number of images in each batch that was compared.
        same_class: Number of images with the same predicted class.
        takes_batches: Whether the file takes any number of images at once; otherwise it takes one.
        quantization: How the model was quantised; empty if there is nothing to say.
        limitation: Why this machine could not run and compare the model; None if it was compared.
    """

    file: str
    difference: float | None
    largest: float | None
    batches: tuple[int, ...]
    same_class: int
    takes_batches: bool
    quantization: Mapping[str, Any] = MappingProxyType({})
    limitation: str | None = None


def without_comparison(target: Format) -> Export:
    """Describe an exported model that this machine cannot run."""
    form = FORMATS[target]
    return Export(form.file, None, None, (), 0, form.takes_batches, {}, form.limitation)


def compare_logits(
    expected: Sequence[np.ndarray], found: Sequence[np.ndarray], *, target: Format, precision: ExportPrecision
) -> Export:
    """Compare the logits of an exported model, batch by batch.

    Args:
        expected: Logits of PyTorch, (B, classes) for each batch.
        found: Logits of the exported model.
        target: Format of the exported model.
        precision: Its precision.

    Raises:
        ExportError: Shapes differ, or a logit differs by more than 0.1 % of the largest one (fp16: 2 %, bf16: 10 %,
            eight bits: 25 %).
    """
    shapes = [array.shape for array in found]
    if shapes != [array.shape for array in expected]:
        raise ExportError(
            f"the model in {target} returns logits of the shapes {shapes}, not {[array.shape for array in expected]}"
        )
    reference, answer = np.concatenate(expected), np.concatenate(found)
    difference = float(abs(answer - reference).max())
    largest = float(abs(reference).max())
    limit = _MAX_DIFFERENCE[precision] * largest
    if not difference <= limit:  # also true for NaN
        advice = "try --precision fp32" if precision != "fp32" else "no file is kept"
        raise ExportError(
            f"a logit of the model in {target} differs from PyTorch by {difference:.3g}, at most {limit:.3g} is "
            f"allowed; {advice}"
        )
    same = int((reference.argmax(1) == answer.argmax(1)).sum())
    batches = tuple(len(array) for array in expected)
    return Export(FORMATS[target].file, difference, largest, batches, same, FORMATS[target].takes_batches)
