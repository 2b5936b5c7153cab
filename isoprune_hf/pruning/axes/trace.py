"""One forward pass that follows the axes of every tensor."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from isoprune_hf.pruning.axes.axis import Axis, Conflict, cut, find, freeze, frozen, is_frozen, unify
from isoprune_hf.pruning.axes.compute import LAYOUT, pointwise
from isoprune_hf.pruning.axes.integers import Comparison, Expression, Integer, mark_attributes
from isoprune_hf.pruning.axes.layout import ONE, Axes
from isoprune_hf.pruning.axes.shortcuts import run
from isoprune_hf.pruning.axes.sizes import PLAIN, SIZES, hold, shape_with_axes


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
    """

    tensors: dict[str, Axes] = field(default_factory=dict)
    equations: list[Equation] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    groups: Axis = ONE  # of the last convolution or norm that has groups
    _names: dict[int, tuple[str, Tensor]] = field(default_factory=dict)  # the tensors are held, so that ids stay
    _modules: list[str] = field(default_factory=lambda: [""])

    def axes(self, x: Tensor) -> Axes:
        """The axes of a tensor, resolved."""
        owner, axes = getattr(x, "_axes", _UNKNOWN)
        if owner is not self:  # none, or those of another trace in a tensor that somebody keeps
            name, _ = self._names.get(id(x), (None, None))
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
        return [frozen(high - low, reason) for low, high in zip(points[:-1], points[1:], strict=True)]

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
                freeze(axis, f"the code of {self._modules[-1] or 'the model'} says {size}")
        elif not is_frozen(axis) or not isinstance(size, Axis):
            self.equations.append(Equation(size, axis, self._modules[-1]))

    def equate(self, left: Expression, right: Expression) -> None:
        """Note that two numbers are the same."""
        self.equations.append(Equation(left, right, self._modules[-1]))

    def count(self, sides: Sequence[Tensor], sizes: Axes) -> None:
        """Note a matrix product or convolution."""
        has_weight = any(self.is_weight(side) for side in sides)
        self.products.append(Product(self._modules[-1], sizes, has_weight))

    def source(self, x: Tensor) -> Source:
        """Where the values of a tensor come from."""
        if id(x) in self._names:
            return Source(tensors=frozenset((self._names[id(x)][0],)))
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


class _Operations(TorchDispatchMode):
    """Applies the rules to each aten operation."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        self.rules: dict[Any, tuple[str, Any]] = {}

    def _source(self, tensors: Iterable[Tensor]) -> Source:
        sources = [self.trace.source(tensor) for tensor in tensors]
        return Source(
            frozenset().union(*(source.steps for source in sources)),
            frozenset().union(*(source.tensors for source in sources)),
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = run(func, args, kwargs)
        known = self.rules.get(func)
        if known is None:
            known = self.rules[func] = _find_rule(func)
        name, rule = known
        outs = (
            [out]
            if isinstance(out, Tensor)
            else [part for part in out or () if isinstance(part, Tensor)]
            if isinstance(out, list | tuple)
            else []
        )
        if not outs:
            return out
        trace = self.trace
        if rule is None:
            trace.unknown[name] = trace.unknown.get(name, 0) + 1
            tensors = tensors_in((*args, *(kwargs or {}).values()))
            found = trace.give_up(tensors, out, f"the operation {name} is not known")
        else:
            found = rule(trace, out, *args, **(kwargs or {}))
        found = [found] if isinstance(found, tuple) else found
        source = self._source(tensors_in((*args, *(kwargs or {}).values())))
        is_live = bool(source.steps or source.tensors)
        if name not in _UNSEEN and is_live:
            trace.steps.append(Step(name, trace._modules[-1], tuple(found), source))
            source = Source(frozenset((len(trace.steps) - 1,)))
        for part, axes in zip(outs, found, strict=True):
            if len(axes) != part.ndim or any(a.size != s for a, s in zip(axes, part.shape, strict=True)):
                axes = trace.give_up(tensors_in(args), part, f"the operation {name} is not as expected")
            if id(part) not in trace._names:
                part._axes = trace, axes
                part._source = trace, source
        return out


_WEIGHT_VIEWS = frozenset(
    (
        "t",
        "transpose",
        "view",
        "permute",
        "expand",
        "unsqueeze",
        "_unsafe_view",
        "clone",
        "slice",
        "split",
        "split_with_sizes",
        "alias",
        "detach",
        "squeeze",
    )
)
# Which of these are run depends on how the memory lies.
_UNSEEN = _WEIGHT_VIEWS | {"_to_copy", "_reshape_alias", "as_strided", "as_strided_", "contiguous", "unbind", "select"}


def is_seen(func: Any) -> str | None:
    """Name of an operation that computes; None where it only lays out memory."""
    name = func._schema.name.removeprefix("aten::")
    name = name if name == "as_strided_" else name.removesuffix("_")
    return None if name in _UNSEEN else name


def _find_rule(func: Any) -> tuple[str, Any]:
    name = func._schema.name.removeprefix("aten::")
    plain = name.removesuffix("_")
    rule = LAYOUT.get(name) or LAYOUT.get(plain)
    if rule is None and (torch.Tag.pointwise in func.tags or _is_pointwise(plain)):
        rule = pointwise
    return plain if name != "as_strided_" else name, rule


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = () if packet is None else packet.overloads()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class _Calls(TorchFunctionMode):
    """Reads the numbers in each call of a torch function."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        self.shape = Tensor.shape.__get__

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":  # Python code that checks its numbers, out of sight
            out = func(*map(_plain, args), **{key: _plain(value) for key, value in (kwargs or {}).items()})
        else:
            out = func(*args, **(kwargs or {}))
        if func == self.shape or name == "size":
            if isinstance(out, torch.Size):
                return shape_with_axes(self.trace, args[0], out)
            if name == "size" and out > 1:
                dim = args[1] if len(args) > 1 else kwargs["dim"]
                return shape_with_axes(self.trace, args[0], args[0].shape)[dim]
            return out
        said = SIZES.get(name)
        if said is not None:
            said(self.trace, out, *args, **(kwargs or {}))
        elif name not in PLAIN:
            hold(self.trace, args)
            hold(self.trace, (kwargs or {}).values())
        return out


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Integer) else value


def trace_network(network: nn.Module, image: Tensor) -> Trace:
    """Run a network once and follow the axes of every tensor; marks the integers that its modules keep, in place.

    Args:
        network: A copy in eval mode that nothing else will use, on the device of `image`.
        image: Of shape (1, C, H, W).

    Raises:
        Whatever the network raises.
    """
    trace = Trace()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        trace._names.setdefault(id(tensor), (name, tensor))
    trace.comparisons = mark_attributes(network)
    image._source = trace, Source(frozenset((-1,)))
    image._axes = trace, tuple(frozen(size, "the image") if size > 1 else ONE for size in image.shape)
    with _paths(network, trace._modules), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), slow_attention():
        with _Operations(trace), _Calls(trace):
            output = network(image)
    for tensor in (
        [output]
        if isinstance(output, Tensor)
        else [value for name, value in output.items() if "logits" in name and isinstance(value, Tensor)]
    ):
        for axis in trace.axes(tensor):
            freeze(axis, "outputs of the classifier")
    return trace


@contextmanager
def _paths(network: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the path of the module that runs on top of a stack."""
    handles = []

    def leave() -> None:
        stack.pop()

    for path, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(lambda *_: leave()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def slow_attention() -> Iterator[None]:
    """Let `nn.MultiheadAttention` be made of operations that can be followed."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
