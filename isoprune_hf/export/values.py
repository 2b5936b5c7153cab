"""The values that formats and their callers exchange: precisions, calibration images and quantised models."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from isoprune_hf.export.sensitivity import Harm
from isoprune_hf.measuring.runtimes.onnx_runtime import Run

ExportPrecision = Literal["fp32", "fp16", "bf16", "int8", "int8-dynamic"]

LOGITS = ("logits",)  # names of the outputs of a classifier

# Precisions of a traced model; the others are made of the file in fp32.
DTYPES: Mapping[ExportPrecision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


class Quantized(NamedTuple):
    """A model of eight bits.

    Args:
        run: Function that maps pixels to logits.
        record: How it was quantised, for `export.json`.
    """

    run: Run
    record: Mapping[str, Any]


class Quantizer(NamedTuple):
    """How a format gets a precision of eight bits.

    Args:
        quantize: Rewrites a file in fp32 with eight bits, given the traced model that it was written from; the pixels
            (B, C, H, W) are calibration images, none if it needs none, and the harm is what it bounds, if it does.
        packages: Packages that it needs besides those of the format.
    """

    quantize: Callable[[torch.export.ExportedProgram, Path, Sequence[np.ndarray], Harm], Quantized]
    packages: tuple[str, ...] = ()


def reading_file(
    quantize: Callable[[Path, Sequence[np.ndarray], Harm], Quantized], packages: tuple[str, ...] = ()
) -> Quantizer:
    """Return the quantizer of a function that reads the file in fp32, not the traced model."""
    return Quantizer(lambda program, file, batches, harm: quantize(file, batches, harm), packages)
