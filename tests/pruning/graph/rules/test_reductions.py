from collections.abc import Callable

import pytest
import torch
from helpers.axis_notation import spell, trace_function
from torch import Tensor

# Name -> reduction of (3, 4, 5), and the dims of its output.
REDUCED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int | None, ...]]] = {
    "mean of one": (lambda x: x.mean(1), (0, 2)),
    "mean of the last": (lambda x: x.mean(-1), (0, 1)),
    "mean of two": (lambda x: x.mean((0, 2)), (1,)),
    "mean by name": (lambda x: torch.mean(x, dim=2), (0, 1)),
    "mean with keepdim": (lambda x: x.mean(1, keepdim=True), (0, None, 2)),
    "sum of all": (lambda x: x.sum(), ()),
    "sum of the last two": (lambda x: x.sum((-1, -2)), (0,)),
    "product": (lambda x: x.prod(0), (1, 2)),
    "variance": (lambda x: x.var(1), (0, 2)),
    "variance with keepdim": (lambda x: x.var(dim=(1, 2), keepdim=True, unbiased=False), (0, None, None)),
    "deviation": (lambda x: x.std(2), (0, 1)),
    "variance and mean": (lambda x: torch.var_mean(x, 1)[1], (0, 2)),
    "largest": (lambda x: x.amax(1), (0, 2)),
    "largest of all": (lambda x: x.amax(), ()),
    "largest with positions": (lambda x: x.max(0)[0], (1, 2)),
    "largest, one number": (lambda x: x.max(), ()),
    "log of a sum": (lambda x: x.logsumexp(1), (0, 2)),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (0, 2)),
    "norm with keepdim": (lambda x: x.norm(dim=-1, keepdim=True), (0, 1, None)),
    "norm of all": (lambda x: torch.linalg.vector_norm(x), ()),
}


@pytest.mark.parametrize("name", REDUCED)
def test_reduction_keeps_other_dims(name: str) -> None:
    reduce, dims = REDUCED[name]
    shape = (3, 4, 5)
    kept = tuple(1 if dim is None else shape[dim] for dim in dims)
    # Tied to what is left, the other tensor has its letters.
    trace = trace_function(lambda m: reduce(m.a) + m.b, a=shape, b=kept)
    assert spell(trace) == "A B C, " + " ".join("1" if dim is None else "ABC"[dim] for dim in dims)
    assert not trace.unknown
