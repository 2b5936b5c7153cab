"""A forward pass that traces the axes of every tensor: `trace_network`.

Two modes of torch are active during the pass. `_CallTracer` sees each call of a Python function of torch, where sizes
are still traced integers, and applies the size rules. `_OpTracer` sees the aten operations that the calls consist of,
and applies the axis rules.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from isoprune_hf.pruning.graph.axis import freeze, frozen_axis
from isoprune_hf.pruning.graph.decisions import deciding_tensors, decision_of
from isoprune_hf.pruning.graph.meta_kernels import run_op
from isoprune_hf.pruning.graph.rules.pointwise import pointwise
from isoprune_hf.pruning.graph.rules.registry import AxisRule
from isoprune_hf.pruning.graph.rules.sizes import CALLS_WITHOUT_SIZES, assume_constant, traced_count, traced_shape
from isoprune_hf.pruning.graph.rules.tables import AXIS_RULES, SIZE_RULES
from isoprune_hf.pruning.graph.tensor_notes import Note, Source, attach_note, read_note
from isoprune_hf.pruning.graph.torch_private import GET_SHAPE, DispatchMode, OpOverload, op_name, tree_leaves
from isoprune_hf.pruning.graph.trace import ONE, Axes, Decision, Trace, TracedOp
from isoprune_hf.pruning.graph.traced_int import TracedInt, mark_attributes

# Operations that change the layout of a tensor but none of its values. Which of them run depends on strides, so a
# trace neither lists nor compares them.
_LAYOUT_OPS = frozenset(
    (
        "_reshape_alias",
        "_to_copy",
        "_unsafe_view",
        "alias",
        "as_strided",
        "as_strided_",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
    )
)
# A linear layer runs one or the other, depending on its input's strides.
_EQUIVALENT_OPS = {"addmm": "mm"}
_COLLECTIONS = (list, tuple)
_KEPT = ("logits", "pred_boxes")  # in names of outputs whose sizes stay
_VALUE_READERS = ("tolist", "numpy")  # methods of a tensor that no operation of aten sees
# The errors that the code of a network may raise when it reads values, which the meta device does not have, or when it
# does not support the size of the image. It is code of any author, so no narrower list is right.
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


class _OpTracer(DispatchMode):
    """Applies the axis rule of each aten operation."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        self.rules: dict[OpOverload, tuple[str, AxisRule | None]] = {}  # a cache of `_find_rule`

    def dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, apply its rule, and attach notes to its outputs."""
        out = run_op(func, args, kwargs)
        deciding = deciding_tensors(func, args)
        if any(any(self.trace.source(tensor)) for tensor in deciding):
            self.trace.decisions.append(decision_of(func, deciding, out, self.trace.modules[-1]))
        known = self.rules.get(func)
        if known is None:
            known = self.rules[func] = _find_rule(func)
        name, rule = known
        outs = list(tensors_in([out]))
        if not outs:
            return out
        trace = self.trace
        given = list(tensors_in((*args, *kwargs.values())))
        if rule is None:
            trace.unknown[name] = trace.unknown.get(name, 0) + 1
            ruled = trace.freeze_all(given, out, f"there is no rule for the operation {name}")
        else:
            ruled = rule(trace, out, *args, **kwargs)
        found = self._check_sizes(name, args, outs, [ruled] if isinstance(ruled, tuple) else ruled)
        source = self._source_of(given)
        if is_bias(name, args, trace.names):
            source = Source(source.ops)  # a bias is not an input of the operation in its own right
        elif name not in _LAYOUT_OPS and (source.ops or source.tensors):
            trace.ops.append(TracedOp(_EQUIVALENT_OPS.get(name, name), trace.modules[-1], tuple(found), source))
            source = Source(frozenset((len(trace.ops) - 1,)))
        for part, axes in zip(outs, found, strict=True):
            if id(part) not in trace.names:
                attach_note(part, Note(trace, axes, source))
        return out

    def _check_sizes(
        self, name: str, args: tuple[Any, ...], outs: Sequence[Tensor], found: Sequence[Axes]
    ) -> list[Axes]:
        """Return the axes of the outputs of an operation, frozen where their sizes are not those of the output."""
        checked = []
        for part, axes in zip(outs, found, strict=True):
            if len(axes) != part.ndim or any(a.size != s for a, s in zip(axes, part.shape, strict=True)):
                reason = f"an output of the operation {name} does not match its rule"
                self.trace.freeze_inputs(tensors_in(args), reason)
                axes = self.trace.frozen_axes(part, reason)
            checked.append(axes)
        return checked

    def _source_of(self, tensors: Iterable[Tensor]) -> Source:
        """Return the union of the sources of tensors."""
        sources = [self.trace.source(tensor) for tensor in tensors]
        if len(sources) == 1:
            return sources[0]
        return Source(
            frozenset().union(*(source.ops for source in sources)),
            frozenset().union(*(source.tensors for source in sources)),
        )


def traced_name(func: OpOverload) -> str | None:
    """Return the name of an operation as a trace lists it; None for an operation that only changes the layout."""
    name = op_name(func)
    name = name if name == "as_strided_" else name.removesuffix("_")
    return None if name in _LAYOUT_OPS else _EQUIVALENT_OPS.get(name, name)


def is_bias(name: str, args: tuple[Any, ...], known: Container[int]) -> bool:
    """Check whether an operation adds a bias, which a linear layer does in its product or after it.

    Args:
        name: The operation.
        args: Its arguments.
        known: Identities of the tensors of the network.
    """
    return name == "add" and any(isinstance(arg, Tensor) and arg.ndim == 1 and id(arg) in known for arg in args)


def _find_rule(func: OpOverload) -> tuple[str, AxisRule | None]:
    """Return the name of an operation without the `_` of an in-place variant, and its rule."""
    name = op_name(func)
    plain = name.removesuffix("_")
    rule = AXIS_RULES.get(name) or AXIS_RULES.get(plain)
    if rule is None and (torch.Tag.pointwise in func.tags or _is_pointwise(plain)):
        rule = pointwise
    return plain if name != "as_strided_" else name, rule


def _is_pointwise(name: str) -> bool:
    """Check whether torch tags any overload of an operation as pointwise; in-place variants often lack the tag."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = () if packet is None else packet.overloads()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in values and in nested lists and tuples of values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, _COLLECTIONS):
            yield from tensors_in(value)


class _CallTracer(TorchFunctionMode):
    """Applies the size rule of each call of a torch function, and makes the entries of shapes traced integers."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            # Its checks of sizes would be recorded as comparisons made by the network.
            out = func(*map(_plain, args), **{key: _plain(value) for key, value in kwargs.items()})
        else:
            out = func(*args, **kwargs)
        if name in _VALUE_READERS and any(self.trace.source(args[0])):
            self.trace.decisions.append(Decision(self.trace.modules[-1], ()))
        if func == GET_SHAPE or name == "size":
            if isinstance(out, torch.Size):
                return traced_shape(self.trace, args[0], out)
            if name == "size" and out > 1:
                dim = args[1] if len(args) > 1 else kwargs["dim"]
                return traced_shape(self.trace, args[0], args[0].shape)[dim]
            return out
        if name in ("numel", "nelement"):
            return traced_count(self.trace, args[0] if args else kwargs["input"], out)
        rule = SIZE_RULES.get(name)
        if rule is not None:
            rule(self.trace, out, *args, **kwargs)
        elif name not in CALLS_WITHOUT_SIZES:
            assume_constant(self.trace, (*args, *kwargs.values()))
        return out


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, TracedInt) else value


def trace_network(network: nn.Module, image: Tensor) -> Trace:
    """Run a network once and trace the axes of every tensor; replaces its integer attributes in place.

    Args:
        network: A copy in eval mode that nothing else will use, on the device of `image`.
        image: Of shape (1, C, H, W).

    Raises:
        Exception: Any error that the network raises.
    """
    trace = Trace()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        trace.names.setdefault(id(tensor), (name, tensor))
    trace.comparisons = mark_attributes(network)
    output = run_traced(network, trace, image)
    for tensor in _outputs_in(output):
        for axis in trace.axes(tensor):
            freeze(axis, "outputs of the network")
    return trace


def run_traced(network: nn.Module, trace: Trace, image: Tensor) -> Any:
    """Run a network on images and add the pass to a trace in place; returns the output of the network."""
    axes = tuple(frozen_axis(size, "the image") if size > 1 else ONE for size in image.shape)
    attach_note(image, Note(trace, axes, Source(frozenset((-1,)))))
    with ExitStack() as stack:
        for context in (torch.no_grad(), decomposed_attention(), _running_modules(network, trace)):
            stack.enter_context(context)
        stack.enter_context(_OpTracer(trace))
        stack.enter_context(_CallTracer(trace))
        return network(image)


def _outputs_in(output: Any) -> list[Tensor]:
    """Return the outputs whose sizes stay: of named ones logits and boxes, or all if there are none; otherwise all."""
    if isinstance(output, Tensor | tuple | list):
        return _leaves_of(output)
    kept = [value for name, value in output.items() if any(part in name for part in _KEPT)]
    return _leaves_of(kept) or _leaves_of([*output.values()])


def _leaves_of(value: Any) -> list[Tensor]:
    """Return all tensors in a value, in named outputs within others, too."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def _running_modules(network: nn.Module, trace: Trace) -> Iterator[None]:
    """Record in a trace, in place, which modules are running and the axes of the outputs of layers."""
    stack = trace.modules

    def leave(_: nn.Module, args: object, output: Any) -> None:
        path = stack.pop()
        if isinstance(output, Tensor) and read_note(output).owner is trace:
            trace.outputs.setdefault(path, []).append(trace.axes(output))

    handles = []
    for path, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def decomposed_attention() -> Iterator[None]:
    """Make all attention consist of operations with a rule, by the math kernel and without fused fast paths.

    The fast path of `nn.MultiheadAttention` is a switch of the process; its value is restored at the end.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
