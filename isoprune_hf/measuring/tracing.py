"""Trace a model for another runtime or format: `plain_copy`, then `trace_model`."""

import copy

import torch
from torch import nn

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification

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
    """Trace a model from `pixel_values` to `logits`, both in fp32, for any batch size.

    Args:
        model: A model in eval mode that `plain_copy` returned; it is not changed.
        pixels: Images (B, C, H, W), at least two.
        dtype: Precision of the weights and of the computation between them.
    """
    if dtype != torch.float32:
        model = copy.deepcopy(model)
        nn.Module.to(model, dtype=dtype)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(_LogitsOnly(model, dtype), (pixels,), dynamic_shapes=shapes, strict=False)


def labels_of(model: IsoPruneForImageClassification) -> dict[int, str]:
    """Return the name of each class."""
    return {int(index): name for index, name in (model.config.id2label or {}).items()}


class _LogitsOnly(nn.Module):
    """Returns the logits as a tensor, because other runtimes cannot return the output class of transformers."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values.to(self.dtype)).logits
        return logits.float()
