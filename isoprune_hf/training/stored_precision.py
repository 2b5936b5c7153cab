"""Train a model that is stored in half precision with weights in float32: `StoredPrecision`.

At usual learning rates most updates of a weight are smaller than the steps of bfloat16, and gradients in float16 reach
its limit: the weights would stay as they are, or become nan.
"""

import copy

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


class StoredPrecision:
    """The types in which a model is stored, while its weights are trained in float32.

    Args:
        model: Its half-precision parameters and buffers become float32, in place.
    """

    def __init__(self, model: nn.Module):
        self._types = {name: tensor.dtype for name, tensor in _tensors(model).items() if tensor.dtype in _HALF}
        _cast(model, dict.fromkeys(self._types, torch.float32))

    def stored(self, model: nn.Module) -> nn.Module:
        """Return a model as it will be stored: a copy in these types, or itself if none is in half precision.

        Args:
            model: The trained model, or a copy of it such as an average of the weights.
        """
        if not self._types:
            return model
        copied = copy.deepcopy(model)
        self.restore(copied)
        return copied

    def restore(self, model: nn.Module) -> None:
        """Cast a model to its stored types, in place."""
        _cast(model, self._types)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _cast(model: nn.Module, types: dict[str, torch.dtype]) -> None:
    tensors = _tensors(model)
    for name, dtype in types.items():
        tensors[name].data = tensors[name].data.to(dtype)
