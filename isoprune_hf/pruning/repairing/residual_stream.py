"""What the output of a layer is added to: the residual stream, seen from the layer.

A layer that writes into a stream can make up for what the layers before it have left wrong there. What it can see of
that must be told in its own terms: between the layer and the sum may lie a norm with fixed statistics, a scale of each
channel, or a change of layout, and these are undone.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}
_BATCH_NORM = signature(nn.functional.batch_norm)
_LEAST = 1e-3  # of the mean scale


class Stream(TorchFunctionMode):
    """Follows the output of a layer until it is added to another tensor of its shape.

    Args:
        on_sum: Called then with the other tensor, in the layout and scale of the output.
    """

    def __init__(self, on_sum: Callable[[Tensor], None]):
        super().__init__()
        self._on_sum = on_sum
        self._now: Tensor | None = None
        self._undo: list[Callable[[Tensor], Tensor]] = []
        self._made: dict[int, Tensor] = {}  # from the output: no stream of its own; held, so that identities stay

    def follow(self, output: Tensor) -> None:
        """Start from an output."""
        self._now, self._undo, self._made = output, [], {id(output): output}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._now is None or not any(id(arg) in self._made for arg in args):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        others = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg is not self._now]
        is_next = any(arg is self._now for arg in args)
        if is_next and name in _SUMS and len(others) == 1 and others[0].shape == self._now.shape and not kwargs:
            found = None if id(others[0]) in self._made else others[0].clone()
            self._now = None
            if found is not None:
                for undo in reversed(self._undo):
                    found = undo(found)
                self._on_sum(found)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._made[id(result)] = result
            undo = _undo(name, args, kwargs, self._now, others) if is_next else None
            if undo is not None:
                self._now = result
                self._undo.append(undo)
        return result


def _undo(
    name: str, args: tuple, kwargs: dict[str, Any], now: Tensor, others: list[Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """What takes a function back, apart from a shift; None where that is not known."""
    if name == "dropout":
        return lambda x: x
    if name == "permute":
        dims = args[1] if len(args) == 2 else args[1:]
        order = [dims.index(dim) for dim in range(len(dims))]
        return lambda x: x.permute(order)
    if name in _PRODUCTS and len(others) == 1 and others[0].numel() == max(others[0].shape, default=1):
        scale = _bounded(others[0])
        return lambda x: x / scale
    if name == "batch_norm":
        given = _BATCH_NORM.bind(*args, **kwargs)
        given.apply_defaults()
        norm = given.arguments
        if not norm["training"]:
            scale = (norm["running_var"] + norm["eps"]).rsqrt()
            scale = _bounded(scale if norm["weight"] is None else scale * norm["weight"])
            return lambda x: x / scale.view(-1, *([1] * (now.ndim - 2)))
    return None


def _bounded(scale: Tensor) -> Tensor:
    """Channels that are nearly switched off tell nothing: what is divided by their scale becomes 0."""
    return scale.masked_fill(scale.abs() < _LEAST * scale.abs().mean(), float("inf"))
