"""Forward passes that begin where the last ones ended: what makes a fit of all layers linear in the depth.

A waypoint is a module whose output is all that the rest of the pass needs, as that of a residual block is. Two
networks are compared layer by layer; once all layers up to a waypoint are done with, its outputs for all images are
held, and later passes begin there. Whether a module is one is tried, and not guessed: with NaN for the outputs of all
that ran before it, and zeros for the images, the network must give what it gave, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batches

_BYTES = 2**32  # of held images or outputs of both networks, on each rank

Begin = Callable[[IsoPruneForImageClassification], AbstractContextManager[None]]


class Waypoint(NamedTuple):
    """A module whose output is all that the rest of a pass needs.

    Args:
        name: Its path, the same in both networks.
        before: Modules that ran before it, the outermost ones; they need not run again.
        end: When it ended, as `Passes` counts the calls and returns of modules.
        size: Bytes of its outputs in both networks, for one image.
    """

    name: str
    before: tuple[str, ...]
    end: int
    size: int


class Held(NamedTuple):
    """The outputs that one network gave for one micro-batch: those of a waypoint, and blanks for what ran before."""

    value: Any
    blanks: Mapping[str, Any]


class Reached(Exception):
    """The forward pass has come to a module, and need not go on."""


class Passes:
    """Micro-batches for passes through a dense and a cut network, which begin as late as they may.

    Iterating gives the images of each micro-batch with a context for each network: within it, a pass over these images
    runs no module that ended before the waypoint last reached.

    Args:
        dense: The network before the cut.
        pruned: The cut network, with modules of the same names.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        bytes_held: The most that images or outputs may take.
    """

    def __init__(
        self,
        dense: IsoPruneForImageClassification,
        pruned: IsoPruneForImageClassification,
        batches: Batches,
        bytes_held: int = _BYTES,
    ):
        self._networks, self._batches, self._bytes_held = (dense, pruned), batches, bytes_held
        self._starts, self._waypoints = _find_waypoints(dense, pruned)
        self._at: Waypoint | None = None
        self._held: list[tuple[torch.Tensor, tuple[Held, ...]]] | None = None
        self._count = 0
        size, images = 0, []
        for pixels, _ in batches:
            self._count += len(pixels)
            size += pixels.nbytes
            images = [*images, (pixels, None)] if size <= bytes_held else []
        if size <= bytes_held:
            self._batches = images

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Begin]]:
        device = self._networks[0].device
        if self._at is None:
            for images, _ in self._batches:
                yield images.to(device), lambda network: _replaced(network, {})
            return
        for blank, held in self._held:
            yield torch.zeros_like(blank, device=device), partial(self._begin, held)

    def reach(self, layer: str) -> None:
        """Let passes begin at the last waypoint before a layer, where its outputs may be held.

        All layers that run before must have been changed for the last time.
        """
        past, start = -1 if self._at is None else self._at.end, self._starts.get(layer, -1)
        passed = [way for way in self._waypoints if past < way.end < start]
        passed = [way for way in passed if way.size * self._count <= self._bytes_held]
        if not passed:
            return
        way = max(passed, key=lambda way: way.end)
        held = []
        for images, begin in self:
            parts = []
            for network in self._networks:
                with begin(network):
                    parts.append(_hold(network, way, images))
            held.append((images.to("meta"), tuple(parts)))
        self._at, self._held = way, held

    def _begin(self, held: tuple[Held, ...], network: IsoPruneForImageClassification) -> AbstractContextManager[None]:
        value, blanks = held[self._networks.index(network)]
        return _replaced(network, {**blanks, self._at.name: value})


def _find_waypoints(*networks: IsoPruneForImageClassification) -> tuple[dict[str, int], list[Waypoint]]:
    """When modules were first called, in the last network, and the waypoints of all of them."""
    found: dict[str, Waypoint] | None = None
    for network in networks:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, *network.config.image_size, generator=generator).to(network.device)
        starts, ends, sizes, wanted = _watch(network, images)
        ways = {}
        for name in sizes if found is None else found.keys() & sizes.keys():
            before = [other for other in sizes if ends[other] < starts[name]]
            outermost = tuple(other for other in before if not any(other.startswith(f"{up}.") for up in before))
            size = sizes[name] + (0 if found is None else found[name].size)
            way = Waypoint(name, outermost, ends[name], size)
            has_parts = next(network.model.get_submodule(name).children(), None) is not None
            if outermost and has_parts and _holds(network, way, images, wanted):
                ways[name] = way
        found = ways
    return starts, sorted(found.values(), key=lambda way: way.end)


def _watch(
    network: IsoPruneForImageClassification, images: torch.Tensor
) -> tuple[dict[str, int], dict[str, int], dict[str, int], torch.Tensor]:
    """First calls and last returns of modules, bytes of the outputs of those called once, and the logits."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    sizes: dict[str, int] = {}
    clock = iter(range(2**62))
    calls: dict[str, int] = {}

    def before(name: str, module: nn.Module, args: Any) -> None:
        starts.setdefault(name, next(clock))
        calls[name] = calls.get(name, 0) + 1

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        ends[name] = next(clock)
        leaves = tree_leaves(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        is_plain = all(leaf.is_floating_point() for leaf in tensors)
        if tensors and is_plain and all(isinstance(leaf, torch.Tensor | int | float | None) for leaf in leaves):
            sizes[name] = sum(leaf.nbytes for leaf in tensors)

    handles = []
    for name, module in network.model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(before, name)))
            handles.append(module.register_forward_hook(partial(after, name)))
    try:
        logits = network(pixel_values=images).logits
    finally:
        for handle in handles:
            handle.remove()
    return starts, ends, {name: size for name, size in sizes.items() if calls[name] == 1}, logits


def _holds(network: IsoPruneForImageClassification, way: Waypoint, images: torch.Tensor, wanted: torch.Tensor) -> bool:
    try:
        value, blanks = _hold(network, way, images)
        with _replaced(network, {**blanks, way.name: value}):
            return torch.equal(network(pixel_values=torch.zeros_like(images)).logits, wanted)
    except LIBRARY_ERRORS:  # what ran before is used otherwise, as NaN cannot be
        return False


def _hold(network: IsoPruneForImageClassification, way: Waypoint, images: torch.Tensor) -> Held:
    """Run until a waypoint, and keep its output with the forms of those before it."""
    found: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        found[name] = tree_map_only(torch.Tensor, lambda leaf: leaf.to("meta"), output)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found[way.name] = tree_map_only(torch.Tensor, lambda leaf: leaf.to("cpu", copy=True), output)
        raise Reached

    handles = [network.model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in way.before]
    handles.append(network.model.get_submodule(way.name).register_forward_hook(stop))
    try:
        network(pixel_values=images)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return Held(found.pop(way.name), found)


@contextmanager
def _replaced(network: IsoPruneForImageClassification, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Let modules give these outputs, NaN for what is on meta, instead of running."""
    modules = {name: network.model.get_submodule(name) for name in outputs}

    def give(output: Any) -> Any:
        # A new tensor each time: what comes after may write into it.
        return tree_map_only(torch.Tensor, lambda leaf: _filled(leaf, network.device), output)

    try:
        for name, module in modules.items():
            module.forward = lambda *args, output=outputs[name], **kwargs: give(output)
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def _filled(leaf: torch.Tensor, device: torch.device) -> torch.Tensor:
    if leaf.is_meta:
        return torch.full_like(leaf, float("nan"), device=device)
    return leaf.to(device, copy=True)
