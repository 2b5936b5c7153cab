"""The fast kernels of the meta device give the outputs that torch's own kernels give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, make_base, make_images
from torch import Tensor, nn

from isoprune_hf.pruning.graph.copying import copy_shapes
from isoprune_hf.pruning.graph.meta_kernels import FastMetaKernels, run_op
from isoprune_hf.pruning.graph.torch_private import DispatchMode, OpOverload, tree_leaves

_Layout = tuple[tuple[int, ...], bool, torch.dtype]


def layouts(values: Any) -> list[_Layout]:
    tensors = [part for part in tree_leaves(values) if isinstance(part, Tensor)]
    return [(tuple(part.shape), part.is_contiguous(), part.dtype) for part in tensors]


class _Compared(DispatchMode):
    """Runs each operation by both kernels; `own` and `torch` hold the layouts of the outputs by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[tuple[str, list[_Layout]]] = []
        self.torch: list[tuple[str, list[_Layout]]] = []

    def dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = layouts((args, kwargs))
        out = run_op(func, args, kwargs)
        assert layouts((args, kwargs)) == before
        # The other outputs are statistics of norms, which nothing reads.
        self.own.append((str(func), layouts(out)[:1]))
        self.torch.append((str(func), layouts(func(*args, **kwargs))[:1]))
        return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_kernels_give_the_layouts_of_torch(family: str, training: bool, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    images = make_images(model).to("meta")
    network = copy_shapes(model).train(training)
    with torch.no_grad(), _Compared() as compared:
        network(images)
    assert compared.own == compared.torch and compared.own


def test_fast_batch_norm_refuses_other_widths() -> None:
    network = nn.BatchNorm2d(4, device="meta")
    images = torch.empty(2, 5, 3, 3, device="meta")
    for training in (True, False):
        with FastMetaKernels(), pytest.raises(RuntimeError):
            network.train(training)(images)
