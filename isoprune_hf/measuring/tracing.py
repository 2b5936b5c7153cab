"""Trace a model for another runtime or format: `plain_copy`, then `trace_model`, with the names of `output_names`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.checkpoint.task_forms import task_of

# Errors of torch and of the runtimes for a model that they cannot trace, convert or open.
EXPORT_ERRORS: tuple[type[Exception], ...] = (*LIBRARY_ERRORS, OSError)


def plain_copy(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    """Return a copy of a model on the CPU in fp32 and eval mode, with an attention that can be traced."""
    plain = copy.deepcopy(model)
    nn.Module.to(plain, device="cpu", dtype=torch.float32)  # transformers wraps its own `to` without types
    if (model.config.base or {}).get("library") == "transformers":
        # The decomposition of the fused attention returns a layout that the model cannot view.
        plain.model.set_attn_implementation("eager")
    return nn.Module.eval(plain)


def trace_model(
    model: IsoPruneForImageClassification, pixels: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.export.ExportedProgram:
    """Trace a model from `pixel_values` to its outputs, all in fp32, for any batch size.

    The program returns a tensor if there is one output, else a tuple, see `output_names`.

    Args:
        model: A model in eval mode that `plain_copy` returned; it is not changed.
        pixels: Images (B, C, H, W), at least two.
        dtype: Precision of the weights and of the computation between them.
    """
    if dtype != torch.float32:
        model = copy.deepcopy(model)
        nn.Module.to(model, dtype=dtype)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(_TensorsOnly(model, dtype), (pixels,), dynamic_shapes=shapes, strict=False)


def run_traced(model: IsoPruneForImageClassification, pixels: np.ndarray) -> np.ndarray:
    """Return the outputs that the traced model must have for pixels (B, C, H, W), see `side_by_side`."""
    with torch.inference_mode():
        found = _TensorsOnly(model, torch.float32)(torch.from_numpy(pixels))
    return side_by_side([value.numpy() for value in (found if isinstance(found, tuple) else (found,))])


def output_names(model: IsoPruneForImageClassification) -> tuple[str, ...]:
    """Return the names of the outputs of a traced model: `logits`, or those of a network of another task.

    Networks of transformers name them; the features of timm are called `pooler_output`.
    """
    if task_of(model.config.base).has_classes:
        return ("logits",)
    blank = torch.zeros(1, *image_size_of(model), device=model.device, dtype=model.dtype)
    with torch.no_grad():
        return tuple(_named_tensors(model.model(blank), task_of(model.config.base).outputs))


def labels_of(model: IsoPruneForImageClassification) -> dict[int, str]:
    """Return the name of each class; nothing for a model without logits."""
    names = model.config.id2label if "logits" in output_names(model) else None
    return {int(index): name for index, name in (names or {}).items()}


def side_by_side(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the outputs of a pass as one array: a single one as it is, several as (B, N)."""
    return outputs[0] if len(outputs) == 1 else np.concatenate([value.reshape(len(value), -1) for value in outputs], 1)


def _named_tensors(output: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of an output by their names: those of `names`, or all if there are none."""
    if isinstance(output, torch.Tensor):
        return {"pooler_output": output}
    named = output if isinstance(output, Mapping) else {f"output_{number}": one for number, one in enumerate(output)}
    kept = names or named
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor) and name in kept}


class _TensorsOnly(nn.Module):
    """Returns tensors alone, because other runtimes cannot return the output class of transformers."""

    def __init__(self, model: IsoPruneForImageClassification, dtype: torch.dtype):
        super().__init__()
        self.form = task_of(model.config.base)
        self.model = model
        self.dtype = dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        pixel_values = pixel_values.to(self.dtype)
        if self.form.has_classes:
            found = [self.model(pixel_values).logits]
        else:
            found = [*_named_tensors(self.model.model(pixel_values), self.form.outputs).values()]
        return found[0].float() if len(found) == 1 else tuple(value.float() for value in found)
