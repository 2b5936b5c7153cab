"""An exported file, timed in its own runtime as the pruned model: `open_exported`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.runtimes.engine import OpenModel
from isoprune_hf.measuring.runtimes.onnx_runtime import Run, numpy_pass, open_onnx
from isoprune_hf.measuring.runtimes.opened import OpenModels
from isoprune_hf.measuring.runtimes.openvino import open_openvino
from isoprune_hf.measuring.runtimes.registry import ENGINES
from isoprune_hf.recipes.values import RuntimeName

OPENERS: Mapping[RuntimeName, Callable[..., Run]] = {"onnxruntime": open_onnx, "openvino": open_openvino}


class ExportedFile(NamedTuple):
    """A pruned model as an export wrote it.

    Args:
        runtime: A key of `OPENERS`.
        precision: Its precision, shown in place of a dtype.
        file: The file of the model.
    """

    runtime: RuntimeName
    precision: str
    file: Path


def open_exported(
    exported: ExportedFile, pruned: IsoPruneForImageClassification, image_size: Sequence[int]
) -> OpenModels:
    """Open an exported file with the threads of PyTorch, under the name `pruned`.

    Args:
        exported: The file.
        pruned: The model that was exported.
        image_size: (C, H, W) of one image.
    """
    run = OPENERS[exported.runtime](exported.file, threads=torch.get_num_threads())
    opened = {"pruned": OpenModel(lambda pixels: numpy_pass(run, pixels))}
    return OpenModels({"pruned": pruned}, opened, image_size, ENGINES[exported.runtime])
