"""Rules of reductions, which combine all elements of some dims."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from isoprune_hf.pruning.graph.rules.pointwise import broadcast
from isoprune_hf.pruning.graph.rules.registry import RuleTable
from isoprune_hf.pruning.graph.trace import ONE, Axes, Trace

rule = RuleTable()


@rule("mean", "sum", "prod", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "any", "all")
@rule("logsumexp", "nansum", "count_nonzero")
def _reduce(trace: Trace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Axes | list[Axes]:
    if args and isinstance(args[0], Tensor):  # max(a, b) and min(a, b) are pointwise
        return broadcast(trace, (x, args[0]), out.shape)
    axes = trace.axes(x)
    reduced = _reduced_dims(x, args, kwargs)
    first = out if isinstance(out, Tensor) else out[0]
    if first.ndim == x.ndim:
        axes = tuple(ONE if dim in reduced else axis for dim, axis in enumerate(axes))
    else:
        axes = tuple(axis for dim, axis in enumerate(axes) if dim not in reduced)
    if len(axes) != first.ndim:
        return trace.freeze_all([x], out, "a reduction over unknown dims")
    return trace.output_axes(out, axes)


def _reduced_dims(x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> set[int]:
    """Return the dims that a call names, or all dims if it names none."""
    found = [arg for arg in args if isinstance(arg, list | tuple) or type(arg) is int]
    dims = kwargs.get("dim", found[0] if found else None)
    if dims is None or dims == []:
        dims = range(x.ndim)
    elif isinstance(dims, int):
        dims = [dims]
    return {dim % x.ndim for dim in dims} if x.ndim else set()


@rule("linalg_vector_norm", "norm")
def _vector_norm(
    trace: Trace, out: Tensor, x: Tensor, order: Any = 2, dims: Any = None, *_: Any, **__: Any
) -> Axes | list[Axes]:
    return _reduce(trace, out, x, list(range(x.ndim)) if dims is None else dims)
