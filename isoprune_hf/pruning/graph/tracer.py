"""A forward pass that follows the axes of every tensor: the rules are applied to each operation that runs."""

from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from isoprune_hf.pruning.graph.axis import freeze, frozen
from isoprune_hf.pruning.graph.meta_kernels import run
from isoprune_hf.pruning.graph.rules import compute, indexing
from isoprune_hf.pruning.graph.rules import views as layout
from isoprune_hf.pruning.graph.rules.sizes import PLAIN, SIZES, hold, shape_with_axes
from isoprune_hf.pruning.graph.trace import ONE, Source, Step, Trace
from isoprune_hf.pruning.graph.traced_int import Integer, mark_attributes

_MODULES = layout, indexing, compute  # importing one registers its rules


class _Operations(TorchDispatchMode):
    """Applies the rules to each aten operation."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        self.rules: dict[Any, tuple[str, Any]] = {}

    def _source(self, tensors: Iterable[Tensor]) -> Source:
        sources = [self.trace.source(tensor) for tensor in tensors]
        if len(sources) == 1:
            return sources[0]
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
        outs = list(tensors_in([out]))
        if not outs:
            return out
        trace, given = self.trace, list(tensors_in((*args, *(kwargs or {}).values())))
        if rule is None:
            trace.unknown[name] = trace.unknown.get(name, 0) + 1
            found = trace.give_up(given, out, f"the operation {name} is not known")
        else:
            found = rule(trace, out, *args, **(kwargs or {}))
        found = [found] if isinstance(found, tuple) else found
        source = self._source(given)
        is_live = bool(source.steps or source.tensors)
        if is_bias(name, args, trace.names):
            source = Source(source.steps)
        elif name not in _UNSEEN and is_live:
            trace.steps.append(Step(_SAME.get(name, name), trace.modules[-1], tuple(found), source))
            source = Source(frozenset((len(trace.steps) - 1,)))
        for part, axes in zip(outs, found, strict=True):
            if len(axes) != part.ndim or any(a.size != s for a, s in zip(axes, part.shape, strict=True)):
                axes = trace.give_up(tensors_in(args), part, f"the operation {name} is not as expected")
            if id(part) not in trace.names:
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
_SAME = {"addmm": "mm"}
_LISTS = list, tuple
# Which of these are run depends on how the memory lies.
_UNSEEN = _WEIGHT_VIEWS | {"_to_copy", "_reshape_alias", "as_strided", "as_strided_", "contiguous", "unbind", "select"}


def is_seen(func: Any) -> str | None:
    """Name of an operation that computes; None where it only lays out memory."""
    name = func._schema.name.removeprefix("aten::")
    name = name if name == "as_strided_" else name.removesuffix("_")
    return None if name in _UNSEEN else _SAME.get(name, name)


def is_bias(name: str, args: tuple, known: Container[int]) -> bool:
    """Whether an operation adds a bias: a linear does it with its product or after it, as its input lies in memory."""
    return name == "add" and any(isinstance(arg, Tensor) and arg.ndim == 1 and id(arg) in known for arg in args)


def _find_rule(func: Any) -> tuple[str, Any]:
    name = func._schema.name.removeprefix("aten::")
    plain = name.removesuffix("_")
    rule = layout.RULES.get(name) or layout.RULES.get(plain)
    if rule is None and (torch.Tag.pointwise in func.tags or _is_pointwise(plain)):
        rule = compute.pointwise
    return plain if name != "as_strided_" else name, rule


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = () if packet is None else packet.overloads()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, _LISTS):
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
        trace.names.setdefault(id(tensor), (name, tensor))
    trace.comparisons = mark_attributes(network)
    image._source = trace, Source(frozenset((-1,)))
    image._axes = trace, tuple(frozen(size, "the image") if size > 1 else ONE for size in image.shape)
    settings = torch.no_grad(), sdpa_kernel(SDPBackend.MATH), slow_attention(), _paths(network, trace.modules)
    with ExitStack() as stack:
        for context in (*settings, _Operations(trace), _Calls(trace)):
            stack.enter_context(context)
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
