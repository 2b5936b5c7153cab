"""Compute in float32 with a model that is stored in half precision: `in_float32`, and `in_stored_types` afterwards.

Sums over images, gradients of small losses and fits of layers need more digits than bfloat16 has, and a wider range
than float16 has. So recipes that read images score, rotate, cut and repair a copy in float32, and the result gets the
types of the base at the end.
"""

import torch
from torch import Tensor

from isoprune_hf.checkpoint.difference import named_tensors
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.graph.copying import copy_modules, replace_tensor

_HALF = (torch.float16, torch.bfloat16)


def in_float32(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    """Return a copy of a model with its half-precision tensors in float32; the model itself if it has none."""
    if not any(tensor.dtype in _HALF for tensor in _tensors(model).values()):
        return model
    return copy_modules(model, lambda tensor: _cast(tensor, torch.float32 if tensor.dtype in _HALF else tensor.dtype))


def in_stored_types(
    model: IsoPruneForImageClassification, base: IsoPruneForImageClassification
) -> tuple[IsoPruneForImageClassification, tuple[str, ...]]:
    """Return a model in the types of its base, and a line if it stays in float32 because its values are too large.

    Args:
        model: A cut of `base` or of `in_float32(base)`; returned itself if its types do not change.
        base: The base.
    """
    types = {name: tensor.dtype for name, tensor in _tensors(base).items()}
    changes = {
        name: tensor for name, tensor in _tensors(model).items() if types.get(name, tensor.dtype) != tensor.dtype
    }
    for name, tensor in changes.items():
        if not tensor.to(types[name]).isfinite().equal(tensor.isfinite()):
            return model, (f"the weights stay in float32: {types[name]} cannot hold the values of {name}",)
    targets = {id(tensor): types[name] for name, tensor in changes.items()}
    if not targets:
        return model, ()
    return copy_modules(model, lambda tensor: _cast(tensor, targets.get(id(tensor), tensor.dtype))), ()


def _tensors(model: IsoPruneForImageClassification) -> dict[str, Tensor]:
    """Return parameters, buffers and the tensors that modules hold as attributes, by name."""
    held = {
        f"{path}.{name}": value
        for path, module in model.model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return held | named_tensors(model.model)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return replace_tensor(tensor, tensor.detach().to(dtype))
