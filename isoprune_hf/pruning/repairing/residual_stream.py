"""Find the tensor that the output of a layer is added to (`ResidualProbe`): the residual stream, as the layer sees it.

A layer that writes into a stream can correct the error that earlier layers left in it. For that, the error must be
expressed in the layout and scale of the layer's output: operations between the layer and the sum (a norm with fixed
statistics, a scale of each channel, a permutation) are undone.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}
_BATCH_NORM = signature(nn.functional.batch_norm)
_NEAR_ZERO_SHARE = 1e-3  # of the mean scale
_Operation = Callable[[Tensor], Tensor]


class ResidualProbe(TorchFunctionMode):
    """Follows the output of a layer through torch functions until it is added to another tensor of its shape.

    Args:
        on_sum: Called with the other tensor, in the layout and scale of the output.
    """

    def __init__(self, on_sum: Callable[[Tensor], None]):
        super().__init__()
        self._on_sum = on_sum
        self._followed: Tensor | None = None
        self._inverses: list[_Operation] = []  # of the operations since the layer, in their order
        # Tensors computed from the output, by id: adding one of them is no residual stream. The tensors are kept, too,
        # so that no other tensor gets the id of one of them.
        self._derived: dict[int, Tensor] = {}

    def follow(self, output: Tensor) -> None:
        """Start to follow an output."""
        self._followed = output
        self._inverses = []
        self._derived = {id(output): output}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        followed = self._followed
        if followed is None or not any(id(arg) in self._derived for arg in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        others = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg is not followed]
        is_next = any(arg is followed for arg in args)
        if is_next and name in _SUMS and len(others) == 1 and others[0].shape == followed.shape and not kwargs:
            self._followed = None
            if id(others[0]) not in self._derived:
                self._report(others[0].clone())
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._derived[id(result)] = result
            inverse = _invert(name, args, kwargs, followed, others) if is_next else None
            if inverse is not None:
                self._followed = result
                self._inverses.append(inverse)
        return result

    def _report(self, other: Tensor) -> None:
        for invert in reversed(self._inverses):
            other = invert(other)
        self._on_sum(other)


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
