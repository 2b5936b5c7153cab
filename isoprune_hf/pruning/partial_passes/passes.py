"""Micro-batches for passes through a network that start in the middle of it (`Passes`).

A network is fitted layer by layer. When all layers up to a waypoint are finished, the outputs that the rest of a pass
needs are stored for all images, and later passes start there: a fit of all layers is linear in the depth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.partial_passes.storage import Storage
from isoprune_hf.pruning.partial_passes.waypoints import (
    Given,
    Stop,
    Waypoint,
    Waypoints,
    kept_outputs,
    replaced_outputs,
    run_until,
)

Begin = Callable[[], AbstractContextManager[None]]


class Images:
    """Micro-batches of images (B, C, H, W), in memory.

    Args:
        parts: The micro-batches.
    """

    def __init__(self, parts: Sequence[torch.Tensor]):
        self.parts = parts
        self.count = sum(len(pixels) for pixels in parts)

    def __add__(self, other: "Images") -> "Images":
        return Images([*self.parts, *other.parts])


class Passes:
    """Micro-batches for passes through a network, which start as late as possible.

    Iterating yields the images of each micro-batch with a function that returns a context: within it, a pass over
    these images runs no module that ended before the waypoint reached last.

    Args:
        network: The network.
        images: The images.
        find: Finds its waypoints; called once one is needed.
        storage: Room for the outputs.
    """

    def __init__(
        self,
        network: IsoPruneForImageClassification,
        images: Images,
        find: Callable[[], Waypoints],
        storage: Storage,
    ):
        self.network, self.images = network, images
        self._find, self.storage = find, storage
        self._current: Waypoint | None = None
        self._held: list[tuple[torch.Tensor, Given]] = []  # images on the meta device

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Begin]]:
        for pixels, given in self.batches():
            yield pixels, partial(replaced_outputs, self.network, given)

    def batches(self) -> Iterator[tuple[torch.Tensor, Given]]:
        """Yield the images of each micro-batch with the stored outputs."""
        device = self.network.device
        if self._current is None:
            yield from ((pixels.to(device), Given({}, ())) for pixels in self.images.parts)
        for blank, given in self._held:
            yield torch.zeros_like(blank, device=device), given

    def reach(self, layer: str) -> None:
        """Start later passes at the last waypoint before a layer for whose outputs there is room.

        All layers that run before `layer` must have their final weights.
        """
        stop = self.stop_before(layer)
        if stop is not None:
            self.start_at(stop, [run_until(self.network, stop, pixels, given) for pixels, given in self.batches()])

    def through(self, layer: str) -> Iterator[tuple[torch.Tensor, Begin]]:
        """Yield like `__iter__`; the passes, which go on at least until a layer runs, serve those of `reach` as well.

        Later passes start at the waypoint only when all were run.
        """
        stop = self.stop_before(layer)
        if stop is None:
            yield from self
            return
        outputs: list[Mapping[str, Any]] = []
        for pixels, given in self.batches():
            yield pixels, partial(self._keeping, stop, given, outputs)
        self.start_at(stop, outputs)

    @contextmanager
    def _keeping(self, stop: Stop, given: Given, outputs: list[Mapping[str, Any]]) -> Iterator[None]:
        """Run a pass within the context from stored outputs, and append those that a waypoint needs."""
        with kept_outputs(self.network, stop, given) as found, replaced_outputs(self.network, given):
            yield
        outputs.append(found)

    def stop_before(self, layer: str) -> Stop | None:
        """Return the waypoint that `reach` starts at, with the room; None if it is the one that was reached last."""
        past = -1 if self._current is None else self._current.end
        waypoints = self._find()
        for way in waypoints.before(layer):
            keep = self.storage.place(way.size * self.images.count) if way.end > past else None
            if keep is not None:
                return Stop(way, keep, waypoints.written)
        return None

    def start_at(self, stop: Stop, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Start later passes at a waypoint, of which these are the outputs for each micro-batch."""
        blanks = [pixels.to("meta") for pixels, _ in self.batches()]
        self._current = stop.way
        self._held = [(blank, Given(found, stop.written)) for blank, found in zip(blanks, outputs, strict=True)]
