"""After a cut: what sizes its leaves have, and whether the network still runs as the trace says."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from isoprune_hf.errors import CheckpointError, UnsupportedArchitectureError
from isoprune_hf.pruning.graph.axis import Axis, find
from isoprune_hf.pruning.graph.axis_graph import RUN_ERRORS, AxisGraph
from isoprune_hf.pruning.graph.cells import Cell
from isoprune_hf.pruning.graph.copying import blank_image, copy_modules, copy_shapes
from isoprune_hf.pruning.graph.meta_kernels import run
from isoprune_hf.pruning.graph.tracer import is_bias, is_seen, slow_attention, tensors_in


class Ran(NamedTuple):
    """An operation and the shapes of its outputs."""

    name: str
    shapes: tuple[tuple[int, ...], ...]


def sizes_after(
    graph: AxisGraph, masks: Mapping[tuple[str, int], np.ndarray], gone: tuple[str, ...]
) -> dict[int, int]:
    """Sizes of all free leaves after a cut, by identity.

    Args:
        graph: The graph of the network before the cut.
        masks: (tensor, dim) -> which of its elements stay; those that are not there stay whole.
        gone: Prefixes of the tensors that leave whole.

    Raises:
        CheckpointError: An element stays in one tensor and leaves in another that is tied to it.
    """
    sizes = {leaf: axis.size for leaf, axis in graph.solution.by_id.items()}
    for leaf, found in graph.members.items():
        counts: dict[int, str] = {}
        kept: dict[bytes, str] = {}
        usual: np.ndarray | None = None  # whether each element stays, as the first tensor has it
        for (name, dim), parts in found.items():
            mask = masks.get((name, dim))
            for cell in () if name.startswith(gone or ("\0",)) else parts:
                labels = cell.labels[leaf]
                stays = np.ones(len(labels), dtype=bool) if mask is None else mask[cell.positions]
                if usual is not None and (usual[labels] == stays).all():
                    continue
                count, elements = _staying(graph, leaf, stays, cell, name)
                counts.setdefault(count, name)
                if elements is not None:
                    kept.setdefault(elements.tobytes(), name)
                    usual = np.zeros(labels.max() + 1, dtype=bool)
                    usual[elements] = True
        if len(counts) > 1:
            (first, name), (second, other) = list(counts.items())[:2]
            raise CheckpointError(f"pruning plan: {name} would keep {first} of what {other} keeps {second} of")
        if len(kept) > 1:
            name, other = list(kept.values())[:2]
            raise CheckpointError(f"pruning plan: {name} would keep other elements than {other}, which is tied to it")
        sizes[leaf] = next(iter(counts), sizes.get(leaf, 1))
    for link in graph.solution.links:  # a quotient lies in no tensor: it keeps the proportion
        real = next((leaf for leaf in link if leaf in graph.members), None)
        for leaf in link - graph.members.keys() if real is not None else ():
            whole = graph.solution.by_id
            sizes[leaf] = whole[leaf].size * sizes[real] // whole[real].size
    return sizes


def _staying(graph: AxisGraph, leaf: int, stays: np.ndarray, cell: Cell, name: str) -> tuple[int, np.ndarray | None]:
    """How many elements of a leaf stay in a tensor, and which; None for dims in heads: each head may keep others."""
    labels, partner = cell.labels[leaf], _partner(graph, leaf, cell.labels)
    kept = np.unique(labels[stays])
    ways = len(labels) // (int(labels.max()) + 1)  # elements of the tensor for each of the leaf
    if partner is None:
        if len(kept) * ways != stays.sum():
            raise CheckpointError(f"pruning plan: {name} would keep a part of a channel")
    elif leaf in graph.heads:
        heads = cell.labels[partner]
        ways //= int(heads.max()) + 1
        return int(stays.sum()) // max(len(np.unique(heads[stays])) * ways, 1), None
    return len(kept), kept


def _partner(graph: AxisGraph, leaf: int, labels: Mapping[int, np.ndarray]) -> int | None:
    """The dims of heads, or the heads of dims, in the same elements."""
    if leaf in graph.heads:
        head = id(find(graph.heads[leaf]))
        return head if head in labels else None
    return next((dim for dim, head in graph.heads.items() if id(find(head)) == leaf and dim in labels), None)


def axis_size(axis: Axis, sizes: Mapping[int, int]) -> int:
    """Size of an axis for sizes of its leaves."""
    axis = find(axis)
    if axis.kind == "leaf":
        return sizes.get(id(axis), axis.size) if axis.frozen is None else axis.size
    parts = [axis_size(part, sizes) for part in axis.parts]
    return int(np.prod(parts, dtype=np.int64)) if axis.kind == "product" else sum(parts)


def check_cut(
    graph: AxisGraph, network: nn.Module, image_size: Sequence[int], sizes: Mapping[int, int], gone: tuple[str, ...]
) -> None:
    """Run a cut network and compare each operation and each shape with what the graph predicts.

    Raises:
        UnsupportedArchitectureError: The network does not run, or runs otherwise.
    """
    try:
        ran = record_run(network, image_size, on_meta=graph.on_meta)
    except RUN_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UnsupportedArchitectureError(
            f"the cut {type(network).__name__} does not run ({reason:.300}); nothing was changed"
        ) from error
    known: dict[int, int] = {}

    def size(axis: Axis) -> int:
        if id(axis) not in known:
            known[id(axis)] = axis_size(axis, sizes)
        return known[id(axis)]

    steps = [step for step in graph.trace.steps if not f"{step.module}.".startswith(gone or ("\0",))]
    for step, now in zip_longest(steps, ran):
        expected = None if step is None else Ran(step.name, tuple(tuple(map(size, axes)) for axes in step.outputs))
        if expected != now:
            where = (step.module if step is not None else "") or "the model"
            raise UnsupportedArchitectureError(
                f"{where} does not run as before after this cut: {_text(now)} instead of {_text(expected)}; exclude "
                "its channels with prune.exclude"
            )


def _text(ran: Ran | None) -> str:
    return "the end" if ran is None else f"{ran.name} to {' and '.join(str(list(shape)) for shape in ran.shapes[:1])}"


class _Recorder(TorchDispatchMode):
    """Notes operations on what comes from the image or the network; the rest may be kept from pass to pass."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.ran: list[Ran] = []
        self.live = {id(tensor): tensor for tensor in tensors}  # held, so that ids stay

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = run(func, args, kwargs)
        outs = [part for part in tensors_in([out]) if id(part) not in self.live]
        given = tensors_in((*args, *(kwargs or {}).values()))
        if any(id(part) in self.live or getattr(part, "_is_live", False) for part in given):
            for part in outs:
                part._is_live = True
            name = is_seen(func)
            shapes = tuple(tuple(part.shape) for part in tensors_in([out]))
            if name is not None and shapes and not is_bias(name, args, self.live):
                self.ran.append(Ran(name, shapes))
        return out


def record_run(network: nn.Module, image_size: Sequence[int], *, on_meta: bool) -> list[Ran]:
    """Run a copy of a network and note its operations."""
    if on_meta:
        copied = copy_shapes(network, dtype=torch.float32)
    else:
        copied = copy_modules(network, lambda tensor: tensor, with_hooks=False)
    image = blank_image(copied, image_size)
    recorder = _Recorder([image, *copied.parameters(), *copied.buffers()])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), slow_attention(), recorder:
        copied.eval()(image)
    return recorder.ran


def total_macs(graph: AxisGraph, sizes: Mapping[int, int], gone: Iterable[str]) -> int:
    """Multiply-accumulates of all matrix products and convolutions for sizes of leaves."""
    gone = tuple(gone) or ("\0",)
    return sum(
        int(np.prod([axis_size(axis, sizes) for axis in product.sizes], dtype=np.int64))
        for product in graph.trace.products
        if not f"{product.module}.".startswith(gone)
    )
