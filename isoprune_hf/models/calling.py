"""Call a module with one tensor that holds all of its inputs: `CallForm`, `adapt` and `restore`; `input_dtype`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Size, Tensor, nn

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models.nested import tensors_of

_FORM = "_call_form"  # attribute of an adapted module


@dataclass(frozen=True)
class CallForm:
    """The inputs of a module, and the outputs that count.

    Args:
        names: For each input, its keyword; None for one that is given by position.
        shapes: For each input, its shape without the dim of the batch.
        outputs: Names of outputs; all tensors count if none are named.
    """

    names: tuple[str | None, ...]
    shapes: tuple[Size, ...]
    outputs: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallForm":
        return self  # a value: copies of a module share it

    def pack(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return a single input itself, and several inputs flattened side by side: (B, N)."""
        return inputs[0] if len(inputs) == 1 else torch.cat([value.flatten(1) for value in inputs], 1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of `pack`."""
        if len(self.shapes) == 1:
            return (packed,)
        inputs, start = [], 0
        for shape in self.shapes:
            end = start + math.prod(shape)
            inputs.append(torch.unflatten(packed[:, start:end], 1, shape))
            start = end
        return tuple(inputs)

    def call(self, function: Any, inputs: Sequence[Tensor]) -> Any:
        """Call a module or its forward method with inputs."""
        pairs = [*zip(self.names, inputs, strict=True)]
        named = {name: value for name, value in pairs if name is not None}
        return function(*(value for name, value in pairs if name is None), **named)

    def tensors(self, output: Any) -> tuple[Tensor, ...]:
        """Return the outputs that count of what a module returned."""
        return tensors_of(output, self.outputs)


def input_dtype(module: nn.Module) -> torch.dtype:
    """Return the type of the inputs of a module: that of its first parameter of real numbers, or of its first one."""
    parameters = list(module.parameters())
    return next((weight.dtype for weight in parameters if weight.is_floating_point()), parameters[0].dtype)


def adapt(module: nn.Module, form: CallForm) -> None:
    """Make a module take one packed tensor and return a tuple of its output tensors that count, in place.

    Its class becomes a child of its class, so its tensors and modules keep their names.

    Raises:
        UnsupportedArchitectureError: Its forward method is an attribute of this one module.
    """
    if "forward" in vars(module):
        raise UnsupportedArchitectureError(
            f"{type(module).__name__}: its forward method was replaced on the instance; pass the module without that"
        )
    vars(module)[_FORM] = form
    module.__class__ = _adapted_class(type(module))  # type: ignore[arg-type]  # mypy takes it for a module


def restore(module: nn.Module) -> None:
    """Undo `adapt`, in place; a module that is not adapted stays as it is."""
    if vars(module).pop(_FORM, None) is not None:
        module.__class__ = type(module).__mro__[1]


@cache
def _adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, packed: Tensor) -> tuple[Tensor, ...]:
        form: CallForm = vars(self)[_FORM]
        inputs = form.unpack(packed)
        return form.tensors(form.call(lambda *args, **named: kind.forward(self, *args, **named), inputs))

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
