"""Find the waypoints of a network (`find_waypoints`), store their outputs and start forward passes from them.

A waypoint is a module whose output, with those of some modules before it, is all that the rest of a pass needs. A
residual block needs no other one; in a network whose cells read the two cells before them, the output of the cell
before it is needed, too. To start a pass at a waypoint (`replaced_outputs`), `forward` of these modules is replaced,
for the duration of the pass, by functions that return stored outputs, and `forward` of the other modules before it by
functions that return blanks. Hooks cannot do this: a module with a forward hook still runs. The replacement is an
attribute of the instance; some modules have such an attribute of their own (FasterNet chooses a method in its
constructor), which is put back.

Outputs that a function of torch reads after the waypoint has returned are the needed ones. Whether they suffice is
tested, because a tensor that was computed from another output may be read as well: with NaN for the outputs of all
other modules before a waypoint, and zeros for the images, the network must return the same logits, bit for bit, and
every module that ends later must read and return the same. The logits alone do not show it: a layer may read tokens
that the head does not.
"""

import math
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from heapq import nsmallest
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.graph.torch_private import tree_map_only
from isoprune_hf.pruning.partial_passes.observation import (
    Observation,
    PassStopped,
    blank_of,
    observe,
    stop_pass,
)
from isoprune_hf.pruning.partial_passes.storage import Keep

_MAX_TESTS = 3  # of candidates between two layers


class Waypoint(NamedTuple):
    """A module whose output, with those of some modules before it, is all that the rest of a pass needs.

    Args:
        name: Its path.
        held: Modules whose outputs are needed: the waypoint itself, and others that ran before it.
        before: The other modules that ran before it, the outermost ones; they need not run again.
        end: Time of its return.
        size: Bytes of the needed outputs for one image.
    """

    name: str
    held: tuple[str, ...]
    before: tuple[str, ...]
    end: int
    size: int


class Waypoints(NamedTuple):
    """The waypoints of a network.

    Args:
        starts: Module -> time of its first call.
        ways: The waypoints, in their order.
        written: Modules into whose outputs the network writes after they have returned.
    """

    starts: Mapping[str, int]
    ways: Sequence[Waypoint]
    written: Collection[str]

    def before(self, layer: str) -> Iterator[Waypoint]:
        """Yield the waypoints that end before a layer is called first, the last one first."""
        start = self.starts.get(layer, -1)
        return (way for way in reversed(self.ways) if way.end < start)


class Stop(NamedTuple):
    """A waypoint with the room for its outputs.

    Args:
        way: The waypoint.
        keep: Stores a tensor.
        written: Modules into whose outputs the network writes after they have returned.
    """

    way: Waypoint
    keep: Keep
    written: Collection[str]


class Given(NamedTuple):
    """Stored outputs that replace modules in a pass.

    Args:
        outputs: Module -> its output; on the meta device if nothing needs it.
        written: Modules into whose outputs the network writes: these are copied for each pass.
    """

    outputs: Mapping[str, Any]
    written: Collection[str]


def find_waypoints(network: IsoPruneForImageClassification, layers: Iterable[str]) -> Waypoints:
    """Find the last waypoint before each of some layers, after the layer before it.

    Of the modules between two layers the one with the fewest bytes of needed outputs is taken. The last candidate is
    tested first. All that comes after a waypoint follows from its outputs, so the test of an earlier candidate ends
    there: the time of all tests is linear in the depth.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, *image_size_of(network), generator=generator).to(network.device)
    whole = observe(network, images)
    between = _candidates(whole, sorted({whole.starts[name] for name in layers if name in whole.starts}))
    kept = {held for ways in between for way in ways for held in way.held}
    outputs = observe(network, images, kept=kept, names=kept).outputs
    order = sorted(whole.ends, key=whole.ends.__getitem__)
    found: list[Waypoint] = []
    for ways in reversed(between):
        following = found[-1] if found else None
        checked = (way for way in ways if _is_waypoint(network, way, following, images, whole, outputs, order))
        found += islice(checked, 1)
    return Waypoints(whole.starts, found[::-1], whole.written)


def _candidates(whole: Observation, starts: Sequence[int]) -> list[list[Waypoint]]:
    """Return the best candidates between each two times, the best one first."""
    outermost: list[str] = []
    between: list[list[Waypoint]] = [[] for _ in starts]
    for name in sorted(whole.sizes, key=whole.ends.__getitem__):
        end = whole.ends[name]
        place = bisect(starts, end)  # of the next layer
        outermost = [other for other in outermost if not other.startswith(f"{name}.")]
        if 0 < place < len(starts):
            ran = [other for other in outermost if whole.ends[other] < whole.starts[name]]
            needed = [other for other in ran if whole.uses.get(other, -1) > end]
            before = tuple(other for other in ran if other not in needed)
            held = (*needed, name)
            between[place].append(Waypoint(name, held, before, end, sum(whole.sizes[other] for other in held)))
        outermost.append(name)
    return [nsmallest(_MAX_TESTS, ways, key=lambda way: (way.size, -way.end)) for ways in between]


def _is_waypoint(
    network: IsoPruneForImageClassification,
    way: Waypoint,
    following: Waypoint | None,
    images: torch.Tensor,
    whole: Observation,
    outputs: Mapping[str, Any],
    order: Sequence[str],
) -> bool:
    """Check whether everything after a candidate is as in a whole pass if nothing before it is computed.

    Args:
        network: The network.
        way: The candidate.
        following: The next waypoint, with which the check ends; None if there is none.
        images: Images of the whole pass.
        whole: The whole pass.
        outputs: Module -> its output in the whole pass.
        order: Modules in the order of their last returns.
    """
    last = None if following is None else following.name
    limit = math.inf if following is None else following.end
    places = [bisect(order, time, key=whole.ends.__getitem__) for time in (way.end, limit)]
    later = order[slice(*places)]
    given = {name: whole.blanks[name] for name in way.before} | {name: outputs[name] for name in way.held}
    try:
        with replaced_outputs(network, Given(given, way.held)):
            found = observe(network, torch.zeros_like(images), names=frozenset(later), last=last)
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


def run_until(
    network: IsoPruneForImageClassification, stop: Stop, images: torch.Tensor, given: Given
) -> dict[str, Any]:
    """Run until the end of a waypoint and return its outputs, see `kept_outputs`; images (B, C, H, W)."""
    with (
        kept_outputs(network, stop, given, stop_pass) as found,
        replaced_outputs(network, given),
        suppress(PassStopped),
    ):
        network(pixel_values=images)
    return found


@contextmanager
def kept_outputs(
    network: IsoPruneForImageClassification, stop: Stop, given: Given, on_end: Callable[[], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Keep, of a pass within the context, the outputs that a waypoint needs, and blanks for the modules before it.

    Args:
        network: The network.
        stop: The waypoint.
        given: Stored outputs that replace modules in the pass; those that are still needed are kept as they are.
        on_end: Called when the waypoint has returned.
    """
    way, found = stop.way, dict[str, Any]()

    def on_return(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name not in way.held:
            found[name] = blank_of(output)
        elif name in given.outputs:
            found[name] = given.outputs[name]
        else:
            keep = partial(stop.keep, is_copied=name in stop.written)
            found[name] = tree_map_only(torch.Tensor, keep, output)
        if name == way.name and on_end is not None:
            on_end()

    names = (*way.before, *way.held)
    handles = [network.model.get_submodule(name).register_forward_hook(partial(on_return, name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_outputs(network: IsoPruneForImageClassification, given: Given) -> Iterator[None]:
    """Replace modules, within the context, by their stored outputs; tensors on the meta device become NaN."""
    modules = {name: network.model.get_submodule(name) for name in given.outputs}
    own = [(module, vars(module)["forward"]) for module in modules.values() if "forward" in vars(module)]
    blanks: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}  # one for all that nothing needs

    def fill(leaf: torch.Tensor, *, is_copied: bool) -> torch.Tensor:
        if not leaf.is_meta:
            return leaf.to(network.device, copy=is_copied)
        key = leaf.shape, leaf.dtype
        if key not in blanks:
            # ten times as fast as full_like, which computes the layout of a tensor on the meta device in Python
            blanks[key] = torch.empty_like(leaf, device=network.device).fill_(math.nan)
        return blanks[key]

    def return_output(name: str, /, *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, partial(fill, is_copied=name in given.written), given.outputs[name])

    try:
        for name, module in modules.items():
            # Stored in the module's __dict__, where it hides the method of the class.
            vars(module)["forward"] = partial(return_output, name)
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)
        for module, forward in own:
            vars(module)["forward"] = forward
