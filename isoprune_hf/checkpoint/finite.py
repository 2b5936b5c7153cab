"""Check that the tensors of a model are finite before it is saved: `require_finite`."""

import math

import torch
from torch import nn

from isoprune_hf.errors import CheckpointError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require_finite(model: nn.Module) -> None:
    """Check every tensor that is saved, see `describe_not_finite`.

    Raises:
        CheckpointError: A value is nan or infinite; the message names its tensor.
    """
    fault = describe_not_finite(model)
    if fault is not None:
        raise CheckpointError(f"the model is not saved: {fault}")


def describe_not_finite(model: nn.Module) -> str | None:
    """Return a line on the first saved tensor with nan or inf; None if there is none.

    A buffer may hold -inf, as the masks of attention do, and one without dims also inf, as the limits of a clamp do.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        # A sum is ten times faster than a test of every element, and rarely overflows for finite elements.
        if tensor.is_meta or tensor.dtype not in _FLOATS or tensor.sum().isfinite():
            continue
        is_allowed = torch.isfinite(tensor)
        if name not in parameters:
            is_allowed |= tensor == -math.inf
            is_allowed |= (tensor == math.inf) & (tensor.ndim == 0)
        if not is_allowed.all():
            wrong = tensor[~is_allowed]
            return (
                f"{wrong.numel():,} of {tensor.numel():,} values of {name!r} are not finite, the first is "
                f"{wrong[0].item()}"
            )
    return None
