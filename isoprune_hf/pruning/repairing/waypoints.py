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
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.graph.torch_private import tree_map_only
from isoprune_hf.pruning.repairing.observation import Observation, PassStopped, blank_of, observe, stored


class Waypoint(NamedTuple):
    """A module whose output, with those of some modules before it, is all that the rest of a pass needs.

    Args:
        name: Its path, the same in both networks.
        held: Modules whose outputs are needed: the waypoint itself, and others that ran before it.
        before: The other modules that ran before it, the outermost ones; they need not run again.
        end: Time of its return.
        size: Bytes of the needed outputs in both networks, for one image.
    """

    name: str
    held: tuple[str, ...]
    before: tuple[str, ...]
    end: int
    size: int


def find_waypoints(
    dense: IsoPruneForImageClassification, pruned: IsoPruneForImageClassification
) -> tuple[dict[str, int], list[Waypoint]]:
    """Find the first calls of the modules of the cut network, and the common waypoints of both, in their order."""
    _, of_dense = _waypoints_of(dense)
    starts, of_pruned = _waypoints_of(pruned, among=of_dense)
    common = [
        way._replace(size=way.size + of_dense[name].size)
        for name, way in of_pruned.items()
        if way.held == of_dense[name].held
    ]
    return starts, sorted(common, key=lambda way: way.end)


def _waypoints_of(
    network: IsoPruneForImageClassification, among: Mapping[str, Waypoint] | None = None
) -> tuple[dict[str, int], dict[str, Waypoint]]:
    """Find the first calls of modules, and the waypoints; only those of names in `among`, if it is given.

    The last candidate is tested first. All that comes after a waypoint follows from its outputs, so the test of an
    earlier candidate ends there: the time of all tests is linear in the depth.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, *image_size_of(network), generator=generator).to(network.device)
    parents = {name for name, module in network.model.named_modules() if name and any(module.children())}
    names = parents if among is None else parents & among.keys()
    whole = observe(network, images, kept=parents)
    ways: dict[str, Waypoint] = {}
    following: Waypoint | None = None
    for way in reversed(_candidates(whole, names)):
        if len(way.held) > 1 and following is not None and way.name.startswith(f"{following.name}."):
            continue  # to store several outputs in the middle of a block takes more time than it saves
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
            end = whole.ends[name]
            needed = [other for other in outermost if other in whole.outputs and whole.uses.get(other, -1) > end]
            before = tuple(other for other in outermost if other not in needed)
            held = (*needed, name)
            found.append(Waypoint(name, held, before, end, sum(whole.sizes[other] for other in held)))
    return sorted(found, key=lambda way: way.end)


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
    given = {name: whole.blanks[name] for name in way.before} | {name: whole.outputs[name] for name in way.held}
    try:
        with replaced_outputs(network, given):
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


def run_until(network: IsoPruneForImageClassification, way: Waypoint, images: torch.Tensor) -> dict[str, Any]:
    """Run until the end of a waypoint; return the outputs of the modules that it needs, and blanks for the others."""
    found: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        found[name] = stored(output) if name in way.held else blank_of(output)
        if name == way.name:
            raise PassStopped

    handles = [
        network.model.get_submodule(name).register_forward_hook(partial(keep, name))
        for name in (*way.before, *way.held)
    ]
    try:
        network(pixel_values=images)
    except PassStopped:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


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


def _filled(leaf: torch.Tensor, device: torch.device) -> torch.Tensor:
    if leaf.is_meta:
        return torch.full_like(leaf, float("nan"), device=device)
    return leaf.to(device, copy=True)
