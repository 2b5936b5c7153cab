"""Fast meta-device kernels of common operations: `run_op`, and `FastMetaKernels` for whole passes.

A kernel of torch on the meta device takes as long as a real one of a small model, mostly for checks of types and
strides, while a trace only needs the shape of the output. Each function here returns the output of one operation, or
None for arguments that it does not cover; these go to the kernel of torch.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.pruning.graph.torch_private import DispatchMode, OpOverload, aten


def _empty(x: Tensor, *shape: int) -> Tensor:
    """Return a contiguous output; `new_empty` and `empty_like` would run Python code on the meta device."""
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _like(x: Tensor) -> Tensor:
    """Return an output with the memory layout of its input."""
    return _empty(x, *x.shape) if x.is_contiguous() else torch.empty_like(x)


def _unary(x: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _like(x) if x.is_floating_point() else None


def _in_place(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _broadcasts_into(x: Any, y: Any, kwargs: dict[str, Any]) -> bool:
    """Check whether the output of a binary operation has the shape and dtype of x."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or kwargs.keys() - {"alpha"}:
        return False
    if not isinstance(y, Tensor):
        return isinstance(y, int | float)
    fits = x.dtype == y.dtype and x.ndim >= y.ndim
    return fits and all(own in (1, size) for own, size in zip(reversed(y.shape), reversed(x.shape), strict=False))


def _binary(x: Any, y: Any, **kwargs: Any) -> Tensor | None:
    return _like(x) if _broadcasts_into(x, y, kwargs) else None


def _binary_in_place(x: Tensor, y: Any, **kwargs: Any) -> Tensor | None:
    return x if _broadcasts_into(x, y, kwargs) else None


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    dim %= max(first.ndim, 1)
    rest = first.shape[:dim], first.shape[dim + 1 :]
    for part in tensors:
        fits = part.is_meta and part.dtype == first.dtype and part.is_contiguous() and part.ndim == first.ndim > 0
        if not fits or (part.shape[:dim], part.shape[dim + 1 :]) != rest:
            return None
    return _empty(first, *rest[0], sum(part.shape[dim] for part in tensors), *rest[1])


def _roll(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _empty(x, *x.shape)


def _mm(x: Tensor, y: Tensor) -> Tensor | None:
    return _empty(x, x.shape[0], y.shape[1]) if x.shape[1] == y.shape[0] else None


def _addmm(bias: Tensor, x: Tensor, y: Tensor, **_: Any) -> Tensor | None:
    if x.shape[1] != y.shape[0] or bias.shape[-1] not in (1, y.shape[1]) or bias.ndim > 1:
        return None
    return _empty(x, x.shape[0], y.shape[1])


def _bmm(x: Tensor, y: Tensor) -> Tensor | None:
    fits = x.shape[0] == y.shape[0] and x.shape[2] == y.shape[1]
    return _empty(x, x.shape[0], x.shape[1], y.shape[2]) if fits else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor | None:
    sides = x.ndim - 2
    if not transposed and weight.shape[0] % groups:  # torch's kernel on the meta device does not check this
        raise RuntimeError(f"{weight.shape[0]} outputs of a convolution do not divide into {groups} groups")
    fits = x.shape[1] == weight.shape[1] * groups
    if transposed or not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    strides, pads, holes = (v if len(v) == sides else list(v) * sides for v in (stride, padding, dilation))
    shape = [
        (size + 2 * pad - hole * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, hole in zip(x.shape[2:], weight.shape[2:], strides, pads, holes, strict=True)
    ]
    return _empty(x, x.shape[0], weight.shape[0], *shape) if min(shape) > 0 else None


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...] | None:
    fits = list(x.shape[-len(shape) :]) == list(shape)
    fits = fits and all(part is None or list(part.shape) == list(shape) for part in (weight, bias))
    # The output is contiguous, whatever the input is, as that of the real kernel.
    return (_empty(x, *x.shape), _empty(x, 1), _empty(x, 1)) if fits else None


def _batch_norm(x: Tensor, *args: Any) -> tuple[Tensor, ...] | None:
    fits = all(part.shape == x.shape[1:2] for part in args if isinstance(part, Tensor))
    return (_like(x), _empty(x, 0), _empty(x, 0)) if fits else None


_UNARY = ("gelu", "relu", "sigmoid", "silu", "tanh", "hardswish", "hardsigmoid", "exp", "hardtanh", "_softmax")
_UNARY_IN_PLACE = ("relu_", "silu_", "hardswish_", "hardsigmoid_", "hardtanh_")
_KERNELS: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType(
    {
        **{getattr(aten, name).default: _unary for name in _UNARY},
        **{getattr(aten, name).default: _in_place for name in _UNARY_IN_PLACE},
        **{getattr(aten, name).Tensor: _binary for name in ("add", "sub", "mul", "div")},
        **{getattr(aten, name).Tensor: _binary_in_place for name in ("add_", "sub_", "mul_", "div_")},
        aten.cat.default: _cat,
        aten.roll.default: _roll,
        aten.mm.default: _mm,
        aten.addmm.default: _addmm,
        aten.bmm.default: _bmm,
        aten.convolution.default: _convolution,
        aten.native_layer_norm.default: _layer_norm,
        aten.native_batch_norm.default: _batch_norm,
        aten._native_batch_norm_legit_no_training.default: _batch_norm,
    }
)


def run_op(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an aten operation; on the meta device by a kernel of this module if there is one for its arguments."""
    kernel = _KERNELS.get(func)
    if kernel is not None and all(part.is_meta for part in args if isinstance(part, Tensor)):
        out = kernel(*args, **kwargs)
        if out is not None:
            return out
    return func(*args, **kwargs)


class FastMetaKernels(DispatchMode):
    """A context in which every aten operation is run by `run_op`."""

    def dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and return its output."""
        return run_op(func, args, kwargs)
