"""Check that the tensors of a model are finite before it is saved: see `require_finite`."""

import math

import torch
from torch import nn

from isoprune_hf.errors import CheckpointError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require_finite(model: nn.Module) -> None:
    """Check every tensor that is saved; a buffer may also hold -inf, as the masks of attention do.

    Raises:
        CheckpointError: A value is nan or infinite; the message names its tensor.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or tensor.dtype not in _FLOATS:
            continue
        is_allowed = torch.isfinite(tensor)
        if name not in parameters:
            is_allowed |= tensor == -math.inf
        if not is_allowed.all():
            wrong = tensor[~is_allowed]
            raise CheckpointError(
                f"the model is not saved: {wrong.numel():,} of {tensor.numel():,} values of {name!r} are not finite, "
                f"the first is {wrong[0].item()}"
            )
