"""What one forward pass has shown: axes of tensors, equations between sizes, matrix products, operations."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis, Conflict, cut, find, freeze, frozen, is_frozen, unify
from isoprune_hf.pruning.graph.traced_int import Comparison, Expression

Axes = tuple[Axis, ...]
ONE = frozen(1, "one element")
_UNKNOWN = (None, ())
_NOWHERE = (None, None)


class Equation(NamedTuple):
    """Two expressions that are the same number, and the module that said so."""

    left: Expression
    right: Expression
    module: str


class Product(NamedTuple):
    """A matrix product or convolution: as many multiply-accumulates as the product of the sizes.

    Args:
        module: Path of the module that makes it.
        sizes: Axes; an element of each factor is used with each of the others.
        has_weight: One side is a parameter.
    """

    module: str
    sizes: Axes
    has_weight: bool


class Source(NamedTuple):
    """Where the values of a tensor come from: numbers of the steps that made it, and tensors of the network.

    The image is step -1. What has neither does not come from the image or the network.
    """

    steps: frozenset[int] = frozenset()
    tensors: frozenset[str] = frozenset()


class Step(NamedTuple):
    """An operation as it was run: its name, its module, the axes of its outputs, and what it was given."""

    name: str
    module: str
    outputs: tuple[Axes, ...]
    source: Source


@dataclass(eq=False)
class Trace:
    """What one forward pass has shown.

    Args:
        tensors: Parameter or buffer -> its axes; those that no operation has read are not there.
        equations: What numbers in the code say about sizes.
        comparisons: Numbers that the code has compared.
        products: All matrix products and convolutions.
        steps: All operations that compute, in order.
        unknown: Operations that no rule knows; all that they touch is frozen.
        names: Tensor of the network, by identity -> its name.
        modules: Paths of the modules that run, the innermost last.
    """

    tensors: dict[str, Axes] = field(default_factory=dict)
    equations: list[Equation] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    groups: Axis = ONE  # of the last convolution or norm that has groups
    names: dict[int, tuple[str, Tensor]] = field(default_factory=dict)  # the tensors are held, so that ids stay
    modules: list[str] = field(default_factory=lambda: [""])

    def axes(self, x: Tensor) -> Axes:
        """The axes of a tensor, resolved."""
        owner, axes = getattr(x, "_axes", _UNKNOWN)
        if owner is not self:  # none, or those of another trace in a tensor that somebody keeps
            name, _ = self.names.get(id(x), (None, None))
            if name is None:
                return tuple(frozen(size, "a constant") if size != 1 else ONE for size in x.shape)
            axes = self.tensors.get(name)
            if axes is None:
                axes = self.tensors[name] = tuple(Axis(size) if size != 1 else ONE for size in x.shape)
        return tuple(map(find, axes))

    def tie(self, axes: Iterable[Axis]) -> Axis:
        """Make axes the same one; where they cannot be, freeze them. Size 1 meets anything."""
        axes = [find(axis) for axis in axes]
        first = max(axes, key=lambda axis: axis.size)
        for axis in axes:
            if axis.size == first.size and find(axis) is not find(first):
                if is_frozen(first) or is_frozen(axis):
                    known, other = (first, axis) if is_frozen(first) else (axis, first)
                    freeze(other, reason_of(known))
                    continue
                try:
                    unify(first, axis)
                except Conflict as conflict:
                    for one in (first, axis):
                        freeze(one, f"parts that do not fit ({conflict})")
        return find(first)

    def cut(self, axis: Axis, points: Sequence[int]) -> list[Axis]:
        """Cut an axis at points; where it cannot be, freeze it."""
        points = sorted({0, *points, axis.size})
        if not is_frozen(axis):
            try:
                return cut(axis, points)
            except Conflict as conflict:
                freeze(axis, str(conflict))
        reason = reason_of(axis)
        return [frozen(high - low, reason) for low, high in itertools.pairwise(points)]

    def fresh(self, out: Tensor, reason: str) -> Axes:
        """Axes that nothing can leave from."""
        return tuple(frozen(size, reason) if size != 1 else ONE for size in out.shape)

    def give_up(self, tensors: Iterable[Tensor], out: Any, reason: str) -> Axes | list[Axes]:
        """Freeze all that an operation touches."""
        for tensor in tensors:
            for axis in self.axes(tensor):
                freeze(axis, reason)
        if isinstance(out, Tensor):
            return self.fresh(out, reason)
        return [self.fresh(part, reason) for part in out if isinstance(part, Tensor)]

    def outputs(self, out: Any, axes: Axes) -> Axes | list[Axes]:
        """The same axes for the outputs of their shape; statistics beside them stay as they are."""
        if isinstance(out, Tensor):
            return axes
        shape = [axis.size for axis in axes]
        return [
            axes if list(part.shape) == shape else self.fresh(part, "statistics")
            for part in out
            if isinstance(part, Tensor)
        ]

    def state(self, size: Expression, axis: Axis) -> None:
        """Note that a number is the size of an axis; a literal freezes it."""
        axis = find(axis)
        if isinstance(size, Axis) and find(size) is axis:
            return
        if isinstance(size, int):
            if size == axis.size:
                freeze(axis, f"the code of {self.modules[-1] or 'the model'} says {size}")
        elif not is_frozen(axis) or not isinstance(size, Axis) or not is_frozen(size):
            self.equations.append(Equation(size, axis, self.modules[-1]))

    def equate(self, left: Expression, right: Expression) -> None:
        """Note that two numbers are the same."""
        self.equations.append(Equation(left, right, self.modules[-1]))

    def count(self, sides: Sequence[Tensor], sizes: Axes) -> None:
        """Note a matrix product or convolution."""
        has_weight = any(self.is_weight(side) for side in sides)
        self.products.append(Product(self.modules[-1], sizes, has_weight))

    def source(self, x: Tensor) -> Source:
        """Where the values of a tensor come from."""
        if id(x) in self.names:
            return Source(tensors=frozenset((self.names[id(x)][0],)))
        owner, source = getattr(x, "_source", _NOWHERE)
        return source if owner is self else Source()

    def is_weight(self, x: Tensor) -> bool:
        """Whether a tensor is one of the network, or a view of one."""
        source = self.source(x)
        return bool(source.tensors) and not source.steps


def reason_of(axis: Axis) -> str:
    """Why nothing can leave from a frozen axis."""
    axis = find(axis)
    while axis.kind != "leaf":
        axis = find(axis.parts[0])
    return axis.frozen or "one element"
