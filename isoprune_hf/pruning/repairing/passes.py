"""Micro-batches for passes through a network that start in the middle of it (`Passes`).

A network is fitted layer by layer. When all layers up to a waypoint are finished, the outputs that the rest of a pass
needs are stored for all images, and later passes start there: a fit of all layers is linear in the depth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.repairing.waypoints import Waypoint, Waypoints, replaced_outputs, run_until

MAX_BYTES = 2**32  # of stored outputs of each network, on each rank

Begin = Callable[[], AbstractContextManager[None]]


class HeldBatch(NamedTuple):
    """The outputs of a network for one micro-batch.

    Args:
        images: The images on the meta device.
        outputs: Module -> its output; on the meta device if nothing needs it.
    """

    images: torch.Tensor
    outputs: Mapping[str, Any]


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
        max_bytes: Largest number of bytes of stored outputs.
    """

    def __init__(
        self,
        network: IsoPruneForImageClassification,
        images: Images,
        find: Callable[[], Waypoints],
        max_bytes: int = MAX_BYTES,
    ):
        self.network, self.images = network, images
        self._find, self._max_bytes = find, max_bytes
        self._current: Waypoint | None = None
        self._held: list[HeldBatch] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Begin]]:
        for pixels, given in self.batches():
            yield pixels, partial(replaced_outputs, self.network, given)

    def batches(self) -> Iterator[tuple[torch.Tensor, Mapping[str, Any]]]:
        """Yield the images of each micro-batch with the stored outputs, by module."""
        device = self.network.device
        if self._current is None:
            yield from ((pixels.to(device), {}) for pixels in self.images.parts)
        for held in self._held:
            yield torch.zeros_like(held.images, device=device), held.outputs

    def reach(self, layer: str) -> None:
        """Start later passes at the last waypoint before a layer whose outputs can be stored.

        All layers that run before `layer` must have their final weights.
        """
        way = self.way_before(layer)
        if way is not None:
            self.start_at(way, [run_until(self.network, way, pixels, given) for pixels, given in self.batches()])

    def way_before(self, layer: str) -> Waypoint | None:
        """Return the waypoint that `reach` starts at; None if it is the one that was reached last."""
        past = -1 if self._current is None else self._current.end
        ways = (way for way in self._find().before(layer) if way.end > past)
        return next((way for way in ways if way.size * self.images.count <= self._max_bytes), None)

    def start_at(self, way: Waypoint, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Start later passes at a waypoint, of which these are the outputs for each micro-batch."""
        blanks = [pixels.to("meta") for pixels, _ in self.batches()]
        self._current = way
        self._held = [HeldBatch(*held) for held in zip(blanks, outputs, strict=True)]
