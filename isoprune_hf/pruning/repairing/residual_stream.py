"""Find the tensor that the output of a layer is added to (`ResidualProbe`): the residual stream, as the layer sees it.

A layer that writes into a stream can correct the error that earlier layers left in it. For that, the error must be
expressed in the layout and scale of the layer's output: operations between the layer and the sum (a norm with fixed
statistics, a scale of each channel, a permutation) are undone.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from inspect import signature
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isoprune_hf.pruning.graph.torch_private import weak_tensor_dict

_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}
_BATCH_NORM = signature(nn.functional.batch_norm)
_NEAR_ZERO_SHARE = 1e-3  # of the mean scale
_Operation = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class _Origin:
    """How a tensor was computed from outputs that are followed.

    Args:
        index: Number of its computation, in their order.
        parents: The origins of the tensors that it was computed from.
    """

    index: int
    parents: tuple["_Origin", ...] = ()

    def is_from(self, other: "_Origin") -> bool:
        """Return whether it was computed from another one, or is it."""
        waiting, seen = [self], {self}
        while waiting:
            origin = waiting.pop()
            if origin is other:
                return True
            newer = {parent for parent in origin.parents if parent.index >= other.index} - seen
            seen |= newer
            waiting.extend(newer)
        return False


@dataclass(eq=False)
class _Path:
    """The operations between the output of a layer and the tensor that is followed now.

    Args:
        start: Origin of the output.
        on_sum: Called with the tensor that the output is added to.
        inverses: Of the operations, in their order.
    """

    start: _Origin
    on_sum: Callable[[Tensor], None]
    inverses: list[_Operation] = field(default_factory=list)

    def report(self, other: Tensor) -> None:
        """Call `on_sum` with a tensor that the followed one is added to."""
        for invert in reversed(self.inverses):
            other = invert(other)
        self.on_sum(other)


class ResidualProbe(TorchFunctionMode):
    """Follows the outputs of layers through torch functions until each is added to another tensor of its shape."""

    def __init__(self) -> None:
        super().__init__()
        self._count = count()
        # Tensors computed from followed outputs: adding one of them to such an output is no residual stream.
        self._origins: MutableMapping[Tensor, _Origin] = weak_tensor_dict()
        self._paths: MutableMapping[Tensor, list[_Path]] = weak_tensor_dict()

    def follow(self, output: Tensor, on_sum: Callable[[Tensor], None]) -> None:
        """Start to follow an output.

        Args:
            output: The output of a layer.
            on_sum: Called once at most, with the tensor that the output is added to in the layout and scale of the
                output.
        """
        start = self._origins.setdefault(output, _Origin(next(self._count)))
        self._paths.setdefault(output, []).append(_Path(start, on_sum))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        parents = tuple(origin for origin in map(self._origins.get, tensors) if origin is not None)
        if not parents:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        followed = [arg for arg in args if isinstance(arg, Tensor) and arg in self._paths]
        for tensor in followed:
            others = _others(args, tensor)
            if name in _SUMS and len(others) == 1 and others[0].shape == tensor.shape and not kwargs:
                self._end(tensor, others[0])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._origins[result] = _Origin(next(self._count), parents)
            for tensor in followed:
                self._go_on(tensor, result, _invert(name, args, kwargs, tensor, _others(args, tensor)))
        return result

    def _end(self, followed: Tensor, other: Tensor) -> None:
        """Report a sum to the paths of its first term, unless the other one was computed from the same output."""
        origin = self._origins.get(other)
        for path in self._paths.pop(followed):
            if origin is None or not origin.is_from(path.start):
                path.report(other.clone())

    def _go_on(self, followed: Tensor, result: Tensor, inverse: _Operation | None) -> None:
        """Follow the result of an operation instead of the tensor that it read, if it can be inverted."""
        if inverse is None:
            return
        for path in self._paths.pop(followed, []):
            path.inverses.append(inverse)
            self._paths.setdefault(result, []).append(path)


def _others(args: tuple[Any, ...], followed: Tensor) -> list[Tensor]:
    return [arg for arg in args[:2] if isinstance(arg, Tensor) and arg is not followed]


def _invert(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], followed: Tensor, others: list[Tensor]
) -> _Operation | None:
    """Return the inverse of a torch function, apart from a shift; None if it is not known."""
    if name == "dropout":
        return lambda x: x
    if name == "permute":
        dims = args[1] if len(args) == 2 else args[1:]
        order = [dims.index(dim) for dim in range(len(dims))]
        return lambda x: x.permute(order)
    if name in _PRODUCTS and len(others) == 1 and others[0].numel() == max(others[0].shape, default=1):
        factor = _without_near_zeros(others[0])
        return lambda x: x / factor
    if name == "batch_norm":
        return _invert_batch_norm(args, kwargs, followed.ndim)
    return None


def _invert_batch_norm(args: tuple[Any, ...], kwargs: Mapping[str, Any], ndim: int) -> _Operation | None:
    """Return the inverse of a BatchNorm with fixed statistics on a tensor of `ndim` dims, apart from its shift."""
    bound = _BATCH_NORM.bind(*args, **kwargs)
    bound.apply_defaults()
    norm = bound.arguments
    if norm["training"]:
        return None
    scale: Tensor = (norm["running_var"] + norm["eps"]).rsqrt()
    scale = _without_near_zeros(scale if norm["weight"] is None else scale * norm["weight"])
    return lambda x: x / scale.view(-1, *([1] * (ndim - 2)))


def _without_near_zeros(scale: Tensor) -> Tensor:
    """Replace scales of 0 and near it by inf, so that dividing by them yields 0 instead of noise."""
    is_small = scale.abs() < _NEAR_ZERO_SHARE * scale.abs().mean()
    return scale.masked_fill(is_small | (scale == 0), float("inf"))
