"""Observe one forward pass of a network: what its modules read and return, and when (`observe`)."""

from collections.abc import Callable, Collection, MutableMapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.graph.torch_private import tree_leaves, tree_map_only, weak_tensor_dict


class Observation(NamedTuple):
    """The order in which the modules of a network ran in one forward pass, and what they read and returned.

    Args:
        starts: Module -> time of its first call, counted in calls and returns of modules, and tensors read.
        ends: Module -> time of its last return.
        uses: Module -> time at which a function of torch last read what it returned or what other functions computed
            from it, unless another module returned that tensor in the meantime.
        written: Modules into whose outputs a function of torch wrote after they had returned.
        sizes: Module that was called once and returned floating-point tensors -> their bytes.
        read: Module -> sums of the tensors that its last call read, by which two passes are compared.
        returned: Module -> sums of the tensors that its last call returned.
        outputs: Module of those that were to be kept -> its last output, on the CPU.
        blanks: Module -> its last output, on the meta device.
        logits: The logits; empty if the pass was stopped.
    """

    starts: dict[str, int]
    ends: dict[str, int]
    uses: dict[str, int]
    written: set[str]
    sizes: dict[str, int]
    read: dict[str, list[torch.Tensor]]
    returned: dict[str, list[torch.Tensor]]
    outputs: dict[str, Any]
    blanks: dict[str, Any]
    logits: torch.Tensor


class PassStopped(Exception):
    """Raised by a hook to stop a forward pass early."""


def stop_pass() -> None:
    """Raise PassStopped."""
    raise PassStopped


def observe(
    network: IsoPruneForImageClassification,
    images: torch.Tensor,
    *,
    kept: Collection[str] = (),
    names: Collection[str] | None = None,
    last: str | None = None,
) -> Observation:
    """Run a forward pass and record when modules start and end, what they read and what they return.

    Args:
        network: The network.
        images: (B, C, H, W).
        kept: Modules whose outputs are kept.
        names: Modules to record, without `uses` and `written`; None for all.
        last: Module after whose return the pass stops; None for a whole pass.
    """
    seen = Observation({}, {}, {}, set(), {}, {}, {}, {}, {}, torch.empty(0))
    calls: dict[str, int] = {}
    # Tensor -> the module that returned it last, or the modules from whose outputs functions computed it.
    sources: MutableMapping[torch.Tensor, frozenset[str]] = weak_tensor_dict()
    owners: MutableMapping[torch.UntypedStorage, set[str]] = WeakKeyDictionary()  # with views of it
    clock = count()

    def compute(call: _Call) -> None:
        used = frozenset[str]().union(*(sources.get(tensor, ()) for tensor in call.read))
        seen.uses.update(dict.fromkeys(used, next(clock)))
        seen.written.update(*(owners.get(tensor.untyped_storage(), ()) for tensor in call.changed))
        sources.update(dict.fromkeys((*call.returned, *call.changed), used))

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.starts.setdefault(name, next(clock))
        calls[name] = calls.get(name, 0) + 1
        seen.read[name] = [leaf.sum() for leaf in _tensors_of((args, kwargs))]

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.ends[name] = next(clock)
        leaves = tree_leaves(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        sources.update(dict.fromkeys(tensors, frozenset((name,))))
        for tensor in tensors:
            owners.setdefault(tensor.untyped_storage(), set()).add(name)
        seen.returned[name] = [leaf.sum() for leaf in tensors]
        seen.blanks[name] = blank_of(output)
        if name in kept:
            seen.outputs[name] = stored(output)
        is_plain = all(leaf.is_floating_point() for leaf in tensors)
        if tensors and is_plain and all(isinstance(leaf, torch.Tensor | int | float | None) for leaf in leaves):
            seen.sizes[name] = sum(leaf.nbytes for leaf in tensors)
        if name == last:
            raise PassStopped

    handles = []
    recorded = [name for name, _ in network.model.named_modules() if name] if names is None else names
    for name in recorded:
        module = network.model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, name)))
    logits = seen.logits
    try:
        with _Functions(compute) if names is None else nullcontext():
            logits = network(pixel_values=images).logits
    except PassStopped:
        pass
    finally:
        for handle in handles:
            handle.remove()
    once = {name: size for name, size in seen.sizes.items() if calls[name] == 1}
    return seen._replace(sizes=once, logits=logits)


def blank_of(output: Any) -> Any:
    """Return an output with its tensors on the meta device."""
    return tree_map_only(torch.Tensor, lambda leaf: leaf.to("meta"), output)


def stored(output: Any) -> Any:
    """Return a copy of an output with its tensors on the CPU."""
    return tree_map_only(torch.Tensor, lambda leaf: leaf.to("cpu", copy=True), output)


class _Call(NamedTuple):
    """A call of a function of torch.

    Args:
        read: Tensors among its arguments.
        changed: Those of them that it wrote into.
        returned: Tensors that it returned.
    """

    read: Sequence[torch.Tensor]
    changed: Sequence[torch.Tensor]
    returned: Sequence[torch.Tensor]


class _Functions(TorchFunctionMode):
    """Reports, within its context, each call of a function of torch.

    Args:
        on_call: Called after each call.
    """

    def __init__(self, on_call: Callable[[_Call], None]):
        super().__init__()
        self._on_call = on_call

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        read = _tensors_of((args, kwargs))
        versions = [_version_of(tensor) for tensor in read]
        result = func(*args, **kwargs)
        changed = [tensor for tensor, version in zip(read, versions, strict=True) if _version_of(tensor) != version]
        self._on_call(_Call(read, changed, _tensors_of(result)))
        return result


def _version_of(tensor: torch.Tensor) -> int:
    """Return the number of writes into a tensor; one of inference mode counts none and is never written."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors_of(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
