"""Verification of a cut: `sizes_after` computes the sizes of leaves, `check_cut` runs the cut network against them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from isoprune_hf.errors import CheckpointError, UnsupportedArchitectureError
from isoprune_hf.pruning.graph.axis import Axis, find
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.cells import Cell
from isoprune_hf.pruning.graph.copying import blank_image, copy_modules, copy_shapes
from isoprune_hf.pruning.graph.decisions import Replay, deciding_tensors
from isoprune_hf.pruning.graph.meta_kernels import run_op
from isoprune_hf.pruning.graph.tensor_notes import is_live, mark_live
from isoprune_hf.pruning.graph.torch_private import DispatchMode, OpOverload
from isoprune_hf.pruning.graph.trace import Decision
from isoprune_hf.pruning.graph.tracer import FORWARD_ERRORS, decomposed_attention, is_bias, tensors_in, traced_name

_Masks = Mapping[tuple[str, int], np.ndarray]


class ObservedOp(NamedTuple):
    """An operation of a cut network, and the shapes of its outputs."""

    name: str
    shapes: tuple[tuple[int, ...], ...]


def train_masks(graph: AxisGraph, masks: _Masks) -> dict[tuple[str, int], np.ndarray]:
    """Return the masks of the tensors that only train mode reads, from those of the tensors that are tied to them.

    Args:
        graph: The graph of the network before the cut.
        masks: (tensor, dim) -> which of its elements are kept; missing dims are kept whole.
    """
    found: dict[tuple[str, int], np.ndarray] = {}
    for leaf, places in graph.members.items():
        trained = {place: cells for place, cells in places.items() if place[0] in graph.trace.train_only}
        source = next((place for place in places if place in masks and place not in trained), None)
        if source is None:
            continue
        cell = places[source][0]
        kept = np.unique(cell.labels[leaf][masks[source][cell.positions]])
        for (name, dim), cells in trained.items():
            mask = found.setdefault((name, dim), np.ones(find(graph.trace.tensors[name][dim]).size, dtype=bool))
            for cell in cells:
                mask[cell.positions] &= np.isin(cell.labels[leaf], kept)
    return found


def sizes_after(graph: AxisGraph, masks: _Masks, removed: tuple[str, ...]) -> dict[int, int]:
    """Compute the sizes of all free leaves after a cut, by identity.

    Args:
        graph: The graph of the network before the cut.
        masks: (tensor, dim) -> which of its elements are kept; missing dims are kept whole.
        removed: Prefixes of the tensors that are removed whole.

    Raises:
        CheckpointError: An element is kept in one tensor and removed from another that is tied to it.
    """
    sizes = {leaf: axis.size for leaf, axis in graph.solution.by_id.items()}
    for leaf in graph.members:
        sizes[leaf] = _leaf_size_after(graph, leaf, masks, removed, sizes.get(leaf, 1))
    for link in graph.solution.links:
        # A leaf that represents a quotient is in no tensor. It keeps its proportion to the linked leaves that are.
        known = next((leaf for leaf in link if leaf in graph.members), None)
        if known is not None:
            by_id = graph.solution.by_id
            for leaf in link - graph.members.keys():
                sizes[leaf] = by_id[leaf].size * sizes[known] // by_id[known].size
    return sizes


def _leaf_size_after(graph: AxisGraph, leaf: int, masks: _Masks, removed: tuple[str, ...], default: int) -> int:
    """Compute the size of one leaf after a cut, and check that all its tensors keep the same elements."""
    counts: dict[int, str] = {}  # number of kept elements -> the first tensor that keeps as many
    kept: dict[bytes, str] = {}  # kept elements -> the first tensor that keeps these
    usual: np.ndarray | None = None  # whether each element is kept in the last tensor that was read
    for (name, dim), cells in graph.members[leaf].items():
        if name.startswith(removed):
            continue
        mask = masks.get((name, dim))
        for cell in cells:
            labels = cell.labels[leaf]
            is_kept = np.ones(len(labels), dtype=bool) if mask is None else mask[cell.positions]
            if usual is not None and (usual[labels] == is_kept).all():
                continue
            count, elements = _kept_elements(graph, leaf, is_kept, cell, name)
            counts.setdefault(count, name)
            if elements is not None:
                kept.setdefault(elements.tobytes(), name)
                usual = np.zeros(labels.max() + 1, dtype=bool)
                usual[elements] = True
    if len(counts) > 1:
        (first, name), (second, other) = list(counts.items())[:2]
        raise CheckpointError(
            f"pruning plan: {name} would keep {first} channels and {other}, which is tied to it, {second}"
        )
    if len(kept) > 1:
        name, other = list(kept.values())[:2]
        raise CheckpointError(f"pruning plan: {name} would keep other channels than {other}, which is tied to it")
    return next(iter(counts), default)


def _kept_elements(
    graph: AxisGraph, leaf: int, is_kept: np.ndarray, cell: Cell, name: str
) -> tuple[int, np.ndarray | None]:
    """Return how many elements of a leaf are kept in a cell, and which.

    Each head may keep other dims, so for dims of heads the second value is None.
    """
    labels = cell.labels[leaf]
    partner = _partner(graph, leaf, cell.labels)
    kept = np.unique(labels[is_kept])
    repeats = len(labels) // (int(labels.max()) + 1)  # positions of the cell for each element of the leaf
    if partner is None:
        if len(kept) * repeats != is_kept.sum():
            raise CheckpointError(f"pruning plan: {name} would keep a part of a channel")
    elif leaf in graph.heads:
        heads = cell.labels[partner]
        repeats //= int(heads.max()) + 1
        return int(is_kept.sum()) // max(len(np.unique(heads[is_kept])) * repeats, 1), None
    return len(kept), kept


def _partner(graph: AxisGraph, leaf: int, labels: Mapping[int, np.ndarray]) -> int | None:
    """Return the dims of a leaf of heads, or the heads of a leaf of dims, if the same elements belong to both."""
    if leaf in graph.heads:
        head = id(find(graph.heads[leaf]))
        return head if head in labels else None
    return next((dim for dim, head in graph.heads.items() if id(find(head)) == leaf and dim in labels), None)


def axis_size(axis: Axis, sizes: Mapping[int, int]) -> int:
    """Compute the size of an axis for given sizes of its leaves, by identity; missing leaves keep their sizes."""
    axis = find(axis)
    if axis.kind == "leaf":
        return sizes.get(id(axis), axis.size) if axis.frozen is None else axis.size
    parts = [axis_size(part, sizes) for part in axis.parts]
    return int(np.prod(parts, dtype=np.int64)) if axis.kind == "product" else sum(parts)


def check_cut(
    graph: AxisGraph, network: nn.Module, image_size: Sequence[int], sizes: Mapping[int, int], removed: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Run a cut network and compare each operation and each shape with the prediction of the graph.

    Args:
        graph: The graph of the network before the cut.
        network: The cut network.
        image_size: Of one image, (C, H, W).
        sizes: Sizes of the leaves after the cut, by identity.
        removed: Prefixes of the modules that are removed whole.

    Returns:
        Buffer -> its new shape, for buffers that a pass overwrites by tensors of other shapes.

    Raises:
        UnsupportedArchitectureError: The network does not run, or runs other operations or shapes.
    """
    try:
        observed, overwritten = observe_run(
            network, image_size, on_meta=graph.on_meta, decisions=graph.trace.decisions
        )
    except FORWARD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UnsupportedArchitectureError(
            f"the cut {type(network).__name__} does not run ({reason:.300}); the base is unchanged"
        ) from error
    known: dict[int, int] = {}

    def size(axis: Axis) -> int:
        if id(axis) not in known:
            known[id(axis)] = axis_size(axis, sizes)
        return known[id(axis)]

    ops = [op for op in graph.trace.ops if not f"{op.module}.".startswith(removed)]
    for op, now in zip_longest(ops, observed):
        expected = None if op is None else ObservedOp(op.name, tuple(tuple(map(size, axes)) for axes in op.outputs))
        if expected != now:
            where = (op.module if op is not None else "") or "the model"
            raise UnsupportedArchitectureError(
                f"{where} does not run as before after this cut: {_describe(now, expected)} instead of "
                f"{_describe(expected, now)}; "
                "exclude its channels with prune.exclude"
            )
    return overwritten


def _describe(op: ObservedOp | None, other: ObservedOp | None) -> str:
    """Describe an operation by its first output whose shape differs from that of the other operation."""
    if op is None:
        return "the end"
    if other is None or other.name != op.name:
        return f"{op.name} to {list(op.shapes[0])}"
    number, (shape, _) = next(
        (number, pair) for number, pair in enumerate(zip_longest(op.shapes, other.shapes)) if pair[0] != pair[1]
    )
    size = "nothing" if shape is None else str(list(shape))
    return f"{op.name} to {size}" + (f" (output {number + 1})" if number else "")


class _Observer(DispatchMode):
    """Lists the operations on tensors that depend on the image or the network.

    Other operations compute constants, which a network may keep from one pass to the next.
    """

    def __init__(self, tensors: Iterable[Tensor], decisions: Sequence[Decision]):
        super().__init__()
        self.replay = Replay(decisions)
        self.ops: list[ObservedOp] = []
        self.live = {id(tensor): tensor for tensor in tensors}  # the tensors are kept so that their identities stay

    def dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = None
        if any(id(part) in self.live or is_live(part) for part in deciding_tensors(func, args)):
            args, out = self.replay.run(func, args)
        if out is None:
            out = run_op(func, args, kwargs)
        outs = [part for part in tensors_in([out]) if id(part) not in self.live]
        given = tensors_in((*args, *kwargs.values()))
        if any(id(part) in self.live or is_live(part) for part in given):
            for part in outs:
                mark_live(part)
            name = traced_name(func)
            shapes = tuple(tuple(part.shape) for part in tensors_in([out]))
            if name is not None and shapes and not is_bias(name, args, self.live):
                self.ops.append(ObservedOp(name, shapes))
        return out


def observe_run(
    network: nn.Module, image_size: Sequence[int], *, on_meta: bool, decisions: Sequence[Decision] = ()
) -> tuple[list[ObservedOp], dict[str, tuple[int, ...]]]:
    """Run a copy of a network on a blank image; return its operations, and the new shapes of overwritten buffers."""
    if on_meta:
        copied = copy_shapes(network, dtype=torch.float32)
    else:
        copied = copy_modules(network, lambda tensor: tensor, with_hooks=False)
    image = blank_image(copied, image_size)
    observer = _Observer([image, *copied.parameters(), *copied.buffers()], decisions)
    with torch.no_grad(), decomposed_attention(), observer:
        copied.eval()(image)
    before = dict(network.named_buffers())
    after = {name: tuple(buffer.shape) for name, buffer in copied.named_buffers() if name in before}
    return observer.ops, {name: shape for name, shape in after.items() if shape != before[name].shape}


def total_macs(graph: AxisGraph, sizes: Mapping[int, int], removed: Iterable[str]) -> int:
    """Count the multiply-accumulates of all matrix products and convolutions for given sizes of leaves.

    Args:
        graph: The graph of the network before the cut.
        sizes: Sizes of the leaves, by identity.
        removed: Prefixes of the modules that are removed whole.
    """
    prefixes = tuple(removed)
    return sum(
        int(np.prod([axis_size(axis, sizes) for axis in product.sizes], dtype=np.int64))
        for product in graph.trace.matrix_products
        if not f"{product.module}.".startswith(prefixes)
    )
