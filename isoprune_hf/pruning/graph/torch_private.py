"""The private names of torch that pruning uses, as read in torch 2.14, behind typed functions.

Only `layers.py` uses others, the base classes of layers. When torch is upgraded, these two files are the ones to
compare with its sources.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = (
    "GET_SHAPE",
    "DispatchMode",
    "OpOverload",
    "aten",
    "op_name",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "tree_leaves",
    "tree_map_only",
    "weak_tensor_dict",
)

aten = torch.ops.aten
# The type of an aten operation, as `__torch_dispatch__` receives it.
OpOverload = torch._ops.OpOverload
# The function that `__torch_function__` receives for `tensor.shape`.
GET_SHAPE: Any = Tensor.shape.__get__  # type: ignore[attr-defined]  # a property in C, annotated as a plain attribute


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate __init_subclass__
    """A context in which every aten operation is passed to `dispatch`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and return its output."""
        raise NotImplementedError


def op_name(func: OpOverload) -> str:
    """Return the name of an aten operation without namespace and overload: `add_` for `aten::add_.Tensor`."""
    return func._schema.name.removeprefix("aten::")


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Return the parameters of a module itself, those registered as None included."""
    return module._parameters


def own_buffers(module: nn.Module) -> Mapping[str, Tensor | None]:
    """Return the buffers of a module itself, those registered as None included."""
    return module._buffers


def own_modules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Return the children of a module, those registered as None and repeated ones included."""
    return module._modules


def weak_tensor_dict() -> MutableMapping[Tensor, Any]:
    """Return an empty dict whose keys are tensors, compared by identity; an entry goes with its tensor."""
    return WeakTensorKeyDictionary()
