"""The record of one forward pass: axes of tensors, equations between sizes, matrix products, operations.

`tracer.trace_network` fills a `Trace`. The rules of operations call its methods, which tie, split and freeze axes.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, find, freeze, frozen_axis, is_frozen, reason_of
from isoprune_hf.pruning.graph.tensor_notes import Source, read_note
from isoprune_hf.pruning.graph.traced_int import Comparison, Expression
from isoprune_hf.pruning.graph.unify import Conflict, split_at, unify

Axes = tuple[Axis, ...]
ONE = frozen_axis(1, "one element")


class Equation(NamedTuple):
    """Two expressions with the same value, and the path of the module whose code states it."""

    left: Expression
    right: Expression
    module: str


class MatrixProduct(NamedTuple):
    """A matrix product or convolution; it makes as many multiply-accumulates as the product of its sizes.

    Args:
        module: Path of the module that computes it.
        sizes: Axes of the rows, columns and so on; the last but one is summed over in a product of two activations.
        has_weight: One side is a parameter or buffer.
    """

    module: str
    sizes: Axes
    has_weight: bool


class Slide(NamedTuple):
    """A convolution along channels, whose kernel sees the neighbours of each channel (ECA).

    Args:
        channels: The axis that it runs along.
        weights: Names of the parameters that its kernel comes from.
    """

    channels: Axis
    weights: frozenset[str]


class Decision(NamedTuple):
    """A decision that code of a network takes by values.

    Args:
        module: Path of the module whose code takes it.
        values: The number or indices that it reads, or the masks; empty if no operation reads them.
    """

    module: str
    values: tuple[Any, ...]


class TracedOp(NamedTuple):
    """An operation that computes values.

    Args:
        name: Its name in aten.
        module: Path of the module that ran it.
        outputs: The axes of each output.
        source: Where its inputs come from.
    """

    name: str
    module: str
    outputs: tuple[Axes, ...]
    source: Source


@dataclass(eq=False)
class Trace:
    """The record of one forward pass.

    Args:
        tensors: Parameter or buffer -> its axes; tensors that no operation read are missing.
        equations: Statements of the code about sizes.
        comparisons: Comparisons of traced integers made by the code.
        matrix_products: All matrix products and convolutions.
        slides: All convolutions along channels.
        ops: All operations that compute values, in order.
        outputs: Path of a layer -> the axes of its output in each of its calls.
        unknown: Operation without a rule -> number of calls; all axes that it touched are frozen.
        group_axis: The groups of the last convolution or norm; `ONE` if it has a single group.
        names: Identity of a tensor of the network -> (name, tensor); the tensor is kept so that its identity stays.
        modules: Paths of the modules that are running, the innermost last.
        train_only: Parameters and buffers that only a pass in train mode reads.
        notes: Lines for the user: parts that could not be traced.
        decisions: Decisions that the code takes by values, in order.
    """

    tensors: dict[str, Axes] = field(default_factory=dict)
    equations: list[Equation] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    matrix_products: list[MatrixProduct] = field(default_factory=list)
    slides: list[Slide] = field(default_factory=list)
    ops: list[TracedOp] = field(default_factory=list)
    outputs: dict[str, list[Axes]] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    group_axis: Axis = ONE
    names: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=lambda: [""])
    train_only: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def axes(self, x: Tensor) -> Axes:
        """Return the axes of a tensor, after all unifications so far."""
        note = read_note(x)
        if note.owner is self:
            return tuple(map(find, note.axes))
        name, _ = self.names.get(id(x), (None, None))
        if name is None:
            return self.frozen_axes(x, "a constant")
        axes = self.tensors.get(name)
        if axes is None:
            axes = self.tensors[name] = tuple(Axis(size) if size != 1 else ONE for size in x.shape)
        return tuple(map(find, axes))

    def tie(self, axes: Iterable[Axis]) -> Axis:
        """Make axes the same axis and return it; those that cannot be are frozen. Axes of size 1 are skipped."""
        axes = [find(axis) for axis in axes]
        first = max(axes, key=lambda axis: axis.size)
        for axis in axes:
            if axis.size == first.size and find(axis) is not find(first):
                if is_frozen(first) or is_frozen(axis):
                    fixed, other = (first, axis) if is_frozen(first) else (axis, first)
                    freeze(other, reason_of(fixed))
                    continue
                try:
                    unify(first, axis)
                except Conflict as conflict:
                    for one in (first, axis):
                        freeze(one, f"its parts do not align ({conflict})")
        return find(first)

    def split_at(self, axis: Axis, points: Sequence[int]) -> list[Axis]:
        """Split an axis at points and return its parts; freezes the axis if it cannot be split."""
        points = sorted({0, *points, axis.size})
        if not is_frozen(axis):
            try:
                return split_at(axis, points)
            except Conflict as conflict:
                freeze(axis, str(conflict))
        reason = reason_of(axis)
        return [frozen_axis(high - low, reason) for low, high in itertools.pairwise(points)]

    def frozen_axes(self, out: Tensor, reason: str) -> Axes:
        """Return new frozen axes for a tensor."""
        return tuple(frozen_axis(size, reason) if size != 1 else ONE for size in out.shape)

    def freeze_inputs(self, inputs: Iterable[Tensor], reason: str) -> None:
        """Freeze all axes of tensors."""
        for tensor in inputs:
            for axis in self.axes(tensor):
                freeze(axis, reason)

    def freeze_all(self, inputs: Iterable[Tensor], out: Any, reason: str) -> Axes | list[Axes]:
        """Freeze all axes of the inputs of an operation, and return frozen axes for its outputs."""
        self.freeze_inputs(inputs, reason)
        if isinstance(out, Tensor):
            return self.frozen_axes(out, reason)
        return [self.frozen_axes(part, reason) for part in out if isinstance(part, Tensor)]

    def output_axes(self, out: Any, axes: Axes) -> Axes | list[Axes]:
        """Return `axes` for every output of their shape, and frozen axes for the other outputs (statistics)."""
        if isinstance(out, Tensor):
            return axes
        shape = [axis.size for axis in axes]
        return [
            axes if list(part.shape) == shape else self.frozen_axes(part, "statistics")
            for part in out
            if isinstance(part, Tensor)
        ]

    def equate_size(self, size: Expression, axis: Axis) -> None:
        """Record that an expression is the size of an axis; a literal freezes the axis."""
        axis = find(axis)
        if isinstance(size, Axis) and find(size) is axis:
            return
        if isinstance(size, int):
            if size == axis.size:
                freeze(axis, f"the code of {self.modules[-1] or 'the model'} uses the literal {size}")
        elif not is_frozen(axis) or not isinstance(size, Axis) or not is_frozen(size):
            self.equate(size, axis)

    def equate(self, left: Expression, right: Expression) -> None:
        """Record that two expressions have the same value."""
        self.equations.append(Equation(left, right, self.modules[-1]))

    def add_matrix_product(self, sides: Sequence[Tensor], sizes: Axes) -> None:
        """Record a matrix product or convolution of two tensors."""
        has_weight = any(self.is_weight(side) for side in sides)
        self.matrix_products.append(MatrixProduct(self.modules[-1], sizes, has_weight))

    def source(self, x: Tensor) -> Source:
        """Return the source of a tensor; it is empty for tensors from outside the image and the network."""
        if id(x) in self.names:
            return Source(tensors=frozenset((self.names[id(x)][0],)))
        note = read_note(x)
        return note.source if note.owner is self else Source()

    def is_weight(self, x: Tensor) -> bool:
        """Check whether a tensor is a parameter or buffer of the network, or a view of one."""
        source = self.source(x)
        return bool(source.tensors) and not source.ops
