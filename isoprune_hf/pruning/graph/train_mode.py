"""The parts of a network that only train mode runs, such as auxiliary classifiers: `trace_train_mode`.

They read channels that a cut removes, so their weights are cut, too; else the cut network could not be trained. They
are neither scored nor pruned themselves, because no image reaches them in eval mode. `check_train_mode` runs them
after the cut.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.axis import freeze, leaves
from isoprune_hf.pruning.graph.copying import blank_image, copy_modules, copy_shapes
from isoprune_hf.pruning.graph.meta_kernels import FastMetaKernels, run_op
from isoprune_hf.pruning.graph.torch_private import DispatchMode, OpOverload, tree_leaves
from isoprune_hf.pruning.graph.trace import Trace
from isoprune_hf.pruning.graph.tracer import FORWARD_ERRORS, run_traced

_ONLY_TRAINED = "only train mode runs its part"
_BATCH = 2  # statistics of a batch need two values for each channel


def trace_train_mode(network: nn.Module, trace: Trace, image: Tensor) -> None:
    """Add the parts that only train mode runs to a trace, in place; a trace of a network without any stays as it is.

    Args:
        network: The network of the trace, which nothing else will use; left in train mode.
        trace: Its trace in eval mode.
        image: Of shape (1, C, H, W).
    """
    unread = {id(tensor): name for name, tensor in network.named_parameters() if name not in trace.tensors}
    if not unread:
        return
    images = image.new_zeros(_BATCH, *image.shape[1:])
    network.train()
    known = set(trace.tensors)
    with torch.random.fork_rng([image.device] if image.is_cuda else []):
        with _kept_record(trace):
            read = _read_in_train_mode(network, images, unread, trace)
        if not read:
            return
        error = _trace_parts(network, trace, images)
    trace.train_only = frozenset(trace.tensors.keys() - known)
    shared = {id(leaf) for name in known for axis in trace.tensors[name] for leaf in leaves(axis)}
    for name in trace.train_only:
        for axis in trace.tensors[name]:
            for leaf in leaves(axis):
                if error or id(leaf) not in shared:
                    freeze(leaf, error or _ONLY_TRAINED)
    if error:
        part = read[0].rpartition(".")[0] or read[0]
        trace.notes.append(f"{part}: {error}; the channels that it reads keep their widths")


def check_train_mode(base: nn.Module, cut: nn.Module, image_size: Sequence[int], *, on_meta: bool) -> None:
    """Run a copy of a cut network in train mode; a network whose base does not run in train mode is not checked.

    Args:
        base: The network before the cut; left untouched.
        cut: The cut network; left untouched, as is the random state.
        image_size: Of one image, (C, H, W).
        on_meta: The networks run on the meta device.

    Raises:
        UnsupportedArchitectureError: Only the base runs in train mode.
    """
    try:
        _run_in_train_mode(cut, image_size, on_meta=on_meta)
    except FORWARD_ERRORS as error:
        try:
            _run_in_train_mode(base, image_size, on_meta=on_meta)
        except FORWARD_ERRORS:
            return
        reason = " ".join(str(error).split())
        raise UnsupportedArchitectureError(
            f"the cut {type(cut).__name__} does not run in train mode ({reason:.300}); the base is unchanged"
        ) from error


def _run_in_train_mode(network: nn.Module, image_size: Sequence[int], *, on_meta: bool) -> None:
    if on_meta:
        copied = copy_shapes(network, dtype=torch.float32)
    else:
        copied = copy_modules(network, torch.clone, with_hooks=False)  # a pass changes the statistics of BatchNorm
    image = blank_image(copied, image_size)
    kernels = FastMetaKernels() if on_meta else nullcontext()
    with torch.random.fork_rng([image.device] if image.is_cuda else []), torch.no_grad(), kernels:
        copied.train()(image.expand(_BATCH, *image_size))


def _read_in_train_mode(network: nn.Module, images: Tensor, unread: Mapping[int, str], trace: Trace) -> list[str]:
    """Return which of the parameters that eval mode leaves unread are read by a pass in train mode.

    If the pass fails, the parameters of the parts that it entered count as read.
    """
    observer = _ReadObserver(unread)
    entered: list[str] = []

    def enter(part: nn.Module, _: Any) -> None:
        entered.extend(unread[id(tensor)] for tensor in part.parameters())

    try:
        with torch.no_grad(), _hooked(_unread_parts(network, trace), enter), observer:
            network(images)
    except FORWARD_ERRORS:  # the trace fails likewise, and says why
        return [*observer.read, *entered]
    return list(observer.read)


class _ReadObserver(DispatchMode):
    """Lists the names of tensors that operations read, in order."""

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names = names
        self.read: dict[str, None] = {}

    def dispatch(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and id(value) in self.names:
                self.read[self.names[id(value)]] = None
        return run_op(func, args, kwargs)


def _trace_parts(network: nn.Module, trace: Trace, images: Tensor) -> str:
    """Trace a pass in train mode; returns why it fails, or an empty text.

    If it fails, the axes of all inputs of the parts that only train mode runs are frozen in place.
    """
    given: list[Tensor] = []

    def note_inputs(_: nn.Module, inputs: Any) -> None:
        given.extend(value for value in tree_leaves(inputs) if isinstance(value, Tensor))

    try:
        with _kept_record(trace, comparisons=True), _hooked(_unread_parts(network, trace), note_inputs):
            output = run_traced(network, trace, images)
            trace.freeze_inputs(
                (value for value in tree_leaves(output) if isinstance(value, Tensor)), "outputs of the network"
            )
    except FORWARD_ERRORS as error:
        del trace.modules[1:]
        reason = (
            f"its pass in train mode cannot be traced ({type(error).__name__}: {' '.join(str(error).split()):.200})"
        )
        trace.freeze_inputs(given, reason)
        return reason
    return ""


def _unread_parts(network: nn.Module, trace: Trace) -> list[nn.Module]:
    """Return the modules that have parameters, none of which is read in eval mode."""
    found = []
    for path, module in network.named_modules():
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters()]
        if names and not any(name in trace.tensors for name in names):
            found.append(module)
    return found


@contextmanager
def _hooked(modules: Iterable[nn.Module], enter: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Call `enter` with each of the modules that runs, and with its inputs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter(module, (args, kwargs))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _kept_record(trace: Trace, *, comparisons: bool = False) -> Iterator[None]:
    """Restore the operations and outputs of a trace at the end, and its comparisons unless they are wanted."""
    before = trace.ops, trace.matrix_products, trace.outputs, trace.unknown, trace.decisions
    count = len(trace.comparisons)
    trace.ops, trace.matrix_products, trace.outputs, trace.unknown, trace.decisions = [], [], {}, {}, []
    try:
        yield
    finally:
        trace.ops, trace.matrix_products, trace.outputs, trace.unknown, trace.decisions = before
        if not comparisons:
            del trace.comparisons[count:]
