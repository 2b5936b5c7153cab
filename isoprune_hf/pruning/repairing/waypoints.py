"""Find the waypoints of a network (`find_waypoints`), store their outputs and start forward passes from them.

A waypoint is a module whose output is all that the rest of a pass needs, as that of a residual block is. To start a
pass at one (`replaced_outputs`), `forward` of the waypoint is replaced, for the duration of the pass, by a function
that returns a stored output, and `forward` of the modules before it by functions that return blanks. Hooks cannot do
this: a module with a forward hook still runs. The replacement is an attribute of the instance; some modules have such
an attribute of their own (FasterNet chooses a method in its constructor), which is put back.

Which modules are waypoints is tested, because it cannot be read from them: with NaN for the outputs of all modules
that ran before a waypoint, and zeros for the images, the network must return the same logits, bit for bit, and every
module that ends later must read and return the same. The logits alone do not show it: a layer may read tokens that the
head does not.
"""

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import nn

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.graph.torch_private import tree_leaves, tree_map_only


class Waypoint(NamedTuple):
    """A module whose output is all that the rest of a pass needs.

    Args:
        name: Its path, the same in both networks.
        before: Modules that ran before it, the outermost ones; they need not run again.
        end: Time of its return, counted in calls and returns of modules.
        size: Bytes of its outputs in both networks, for one image.
    """

    name: str
    before: tuple[str, ...]
    end: int
    size: int


class HeldOutput(NamedTuple):
    """The outputs of one network for one micro-batch.

    Args:
        value: Output of the waypoint, on the CPU.
        blanks: Module that ran before it -> its output on the meta device.
    """

    value: Any
    blanks: Mapping[str, Any]


class Observation(NamedTuple):
    """The order in which the modules of a network ran in one forward pass, and what they read and returned.

    Args:
        starts: Module -> time of its first call, counted in calls and returns of modules.
        ends: Module -> time of its last return.
        sizes: Module that was called once and returned floating-point tensors -> their bytes.
        read: Module -> sums of the tensors that its last call read, by which two passes are compared.
        returned: Module -> sums of the tensors that its last call returned.
        outputs: Module of those that were to be kept -> its last output, on the CPU.
        blanks: Module -> its last output, on the meta device.
        logits: The logits; empty if the pass was stopped.
    """

    starts: dict[str, int]
    ends: dict[str, int]
    sizes: dict[str, int]
    read: dict[str, list[torch.Tensor]]
    returned: dict[str, list[torch.Tensor]]
    outputs: dict[str, Any]
    blanks: dict[str, Any]
    logits: torch.Tensor


class PassStopped(Exception):
    """Raised by a hook to stop a forward pass early."""


def find_waypoints(
    dense: IsoPruneForImageClassification, pruned: IsoPruneForImageClassification
) -> tuple[dict[str, int], list[Waypoint]]:
    """Find the first calls of the modules of the cut network, and the common waypoints of both, in their order."""
    _, of_dense = _waypoints_of(dense)
    starts, of_pruned = _waypoints_of(pruned, among=of_dense)
    common = [way._replace(size=way.size + of_dense[name].size) for name, way in of_pruned.items()]
    return starts, sorted(common, key=lambda way: way.end)


def _waypoints_of(
    network: IsoPruneForImageClassification, among: Mapping[str, Waypoint] | None = None
) -> tuple[dict[str, int], dict[str, Waypoint]]:
    """Find the first calls of modules, and the waypoints; only those of names in `among`, if it is given.

    The last candidate is tested first. All that comes after a waypoint follows from its output, so the test of an
    earlier candidate ends there: the time of all tests is linear in the depth.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, *image_size_of(network), generator=generator).to(network.device)
    parents = {name for name, module in network.model.named_modules() if name and any(module.children())}
    names = parents if among is None else parents & among.keys()
    whole = _observe(network, images, kept=names)
    ways: dict[str, Waypoint] = {}
    following: Waypoint | None = None
    for way in reversed(_candidates(whole, names)):
        if _is_waypoint(network, way, following, images, whole):
            ways[way.name] = following = way
    return whole.starts, ways


def _candidates(whole: Observation, names: Collection[str]) -> list[Waypoint]:
    """Return the modules of `names` before which other modules ran, in the order in which they end."""
    ended = deque(sorted(whole.sizes, key=whole.ends.__getitem__))
    outermost: list[str] = []
    found = []
    for name in sorted(names & whole.sizes.keys(), key=whole.starts.__getitem__):
        while whole.ends[ended[0]] < whole.starts[name]:
            outer = ended.popleft()  # a module ends after its parts
            outermost = [other for other in outermost if not other.startswith(f"{outer}.")]
            outermost.append(outer)
        if outermost:
            found.append(Waypoint(name, tuple(outermost), whole.ends[name], whole.sizes[name]))
    return sorted(found, key=lambda way: way.end)


def _observe(
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
        names: Modules to record; None for all.
        last: Module after whose return the pass stops; None for a whole pass.
    """
    seen = Observation({}, {}, {}, {}, {}, {}, {}, torch.empty(0))
    calls: dict[str, int] = {}
    clock = count()

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.starts.setdefault(name, next(clock))
        calls[name] = calls.get(name, 0) + 1
        seen.read[name] = [leaf.sum() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.ends[name] = next(clock)
        leaves = tree_leaves(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        seen.returned[name] = [leaf.sum() for leaf in tensors]
        seen.blanks[name] = _blank(output)
        if name in kept:
            seen.outputs[name] = _stored(output)
        is_plain = all(leaf.is_floating_point() for leaf in tensors)
        if tensors and is_plain and all(isinstance(leaf, torch.Tensor | int | float | None) for leaf in leaves):
            seen.sizes[name] = sum(leaf.nbytes for leaf in tensors)
        if name == last:
            raise PassStopped

    handles = []
    for name, module in network.model.named_modules():
        if name and (names is None or name in names):
            handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(after, name)))
    logits = seen.logits
    try:
        logits = network(pixel_values=images).logits
    except PassStopped:
        pass
    finally:
        for handle in handles:
            handle.remove()
    once = {name: size for name, size in seen.sizes.items() if calls[name] == 1}
    return seen._replace(sizes=once, logits=logits)


def _is_waypoint(
    network: IsoPruneForImageClassification,
    way: Waypoint,
    following: Waypoint | None,
    images: torch.Tensor,
    whole: Observation,
) -> bool:
    """Check whether everything after a candidate is as in a whole pass if nothing before it is computed.

    Args:
        network: The network.
        way: The candidate.
        following: The next waypoint, with which the check ends; None if there is none.
        images: Images of the whole pass.
        whole: The whole pass.
    """
    last = None if following is None else following.name
    limit = math.inf if following is None else following.end
    later = [name for name, end in whole.ends.items() if way.end < end <= limit]
    given = {name: whole.blanks[name] for name in way.before} | {way.name: whole.outputs[way.name]}
    try:
        with replaced_outputs(network, given):
            found = _observe(network, torch.zeros_like(images), names=frozenset(later), last=last)
    except LIBRARY_ERRORS:  # an earlier output is used in a way that NaN does not allow
        return False
    if last is None and not torch.equal(found.logits, whole.logits):
        return False
    return all(
        _are_equal(found.returned.get(name, []), whole.returned[name])
        and (whole.starts[name] < way.end or _are_equal(found.read.get(name, []), whole.read[name]))
        for name in later
    )


def _are_equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in zip(first, second, strict=True)
    )


def run_until(network: IsoPruneForImageClassification, way: Waypoint, images: torch.Tensor) -> HeldOutput:
    """Run until the end of a waypoint; return its output, and blanks for the outputs of the modules before it."""
    found: dict[str, Any] = {}

    def keep_blank(name: str, module: nn.Module, args: Any, output: Any) -> None:
        found[name] = _blank(output)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found[way.name] = _stored(output)
        raise PassStopped

    handles = [
        network.model.get_submodule(name).register_forward_hook(partial(keep_blank, name)) for name in way.before
    ]
    handles.append(network.model.get_submodule(way.name).register_forward_hook(stop))
    try:
        network(pixel_values=images)
    except PassStopped:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return HeldOutput(found.pop(way.name), found)


@contextmanager
def replaced_outputs(network: IsoPruneForImageClassification, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Replace modules, within the context, by their stored outputs; tensors on the meta device become NaN."""
    modules = {name: network.model.get_submodule(name) for name in outputs}
    own = [(module, vars(module)["forward"]) for module in modules.values() if "forward" in vars(module)]

    def return_copy(output: Any, /, *args: Any, **kwargs: Any) -> Any:
        # A new tensor for each call: the following modules may write into it.
        return tree_map_only(torch.Tensor, lambda leaf: _filled(leaf, network.device), output)

    try:
        for name, module in modules.items():
            # Stored in the module's __dict__, where it hides the method of the class.
            vars(module)["forward"] = partial(return_copy, outputs[name])
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)
        for module, forward in own:
            vars(module)["forward"] = forward


def _blank(output: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda leaf: leaf.to("meta"), output)


def _stored(output: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda leaf: leaf.to("cpu", copy=True), output)


def _filled(leaf: torch.Tensor, device: torch.device) -> torch.Tensor:
    if leaf.is_meta:
        return torch.full_like(leaf, float("nan"), device=device)
    return leaf.to(device, copy=True)
