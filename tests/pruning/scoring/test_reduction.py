import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoprune_hf.pruning.scoring.reduction import _CHUNK_ELEMENTS, _ElementSums


class NewMemory(TorchDispatchMode):
    """Adds up the bytes of all results that are not views of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = {leaf.untyped_storage().data_ptr() for leaf in given}
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in before:
                self.bytes += leaf.nbytes
        return found


def test_all_tensors_share_one_chunk() -> None:
    values = [torch.ones(2, _CHUNK_ELEMENTS // 2), torch.ones(_CHUNK_ELEMENTS // 4, 8), torch.ones(128, 1024)]
    sums = 8 * sum(2 * len(value) for value in values)  # rows twice: room for their order
    elements = _ElementSums("sum")
    with NewMemory() as memory:
        for value in values:
            elements.along(value, [0])
    # A chunk of its own for each would be four MiB, and leave holes in the heap that no later chunk fits into.
    assert memory.bytes <= sums + 2**20


SHAPES = [(), (7,), (5, 3), (2, 3, 4, 2), (0, 4), (300, 1024), (3, _CHUNK_ELEMENTS + 5)]


@pytest.mark.parametrize("norm", ["sum", "channel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_equal_those_of_whole_tensor(norm: str, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    elements = _ElementSums(norm)
    elements.along(torch.randn(9, 400), [0, 1])  # must leave nothing behind
    wide = value.double().reshape(-1) if not shape else value.double()
    wide = wide.abs() if norm == "sum" else wide.square()
    dims = list(range(wide.ndim))
    found = elements.along(value, dims)
    assert list(found) == dims
    for dim in dims:
        others = [other for other in dims if other != dim]
        torch.testing.assert_close(found[dim], wide.sum(others) if others else wide, rtol=1e-12, atol=0)
