"""Micro-batches for passes through a dense and a cut network that start in the middle of the network (`Passes`).

Two networks are compared layer by layer. When all layers up to a waypoint are finished, the outputs that the rest of
a pass needs are stored for all images, and later passes start there: a fit of all layers is linear in the depth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batches
from isoprune_hf.pruning.repairing.waypoints import (
    Waypoint,
    find_waypoints,
    replaced_outputs,
    run_until,
)

_MAX_BYTES = 2**32  # of stored images, and of stored outputs of both networks, on each rank

Begin = Callable[[IsoPruneForImageClassification], AbstractContextManager[None]]


class HeldBatch(NamedTuple):
    """The outputs of all networks for one micro-batch.

    Args:
        images: The images on the meta device.
        outputs: For each network, module -> its output; on the meta device if nothing needs it.
    """

    images: torch.Tensor
    outputs: tuple[Mapping[str, Any], ...]


class Passes:
    """Micro-batches for passes through a dense and a cut network, which start as late as possible.

    Iterating yields the images of each micro-batch with a function that returns a context for a network: within it, a
    pass over these images runs no module that ended before the waypoint reached last.

    Args:
        dense: The network before the cut.
        pruned: The cut network, with modules of the same names.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        max_bytes: Largest number of bytes of stored images, or of stored outputs.

    Attributes:
        images: Number of this rank's images.
    """

    def __init__(
        self,
        dense: IsoPruneForImageClassification,
        pruned: IsoPruneForImageClassification,
        batches: Batches,
        max_bytes: int = _MAX_BYTES,
    ):
        self._networks = (dense, pruned)
        self._max_bytes = max_bytes
        self._starts, self._waypoints = find_waypoints(dense, pruned)
        self._current: Waypoint | None = None
        self._held: list[HeldBatch] = []
        self._batches = batches
        self._stored: list[torch.Tensor] | None = []  # all images, unless they need too many bytes
        self.images = 0
        size = 0
        for pixels, _ in batches:
            self.images += len(pixels)
            size += pixels.nbytes
            if size > max_bytes:
                self._stored = None
            elif self._stored is not None:
                self._stored.append(pixels)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Begin]]:
        device = self._networks[0].device
        if self._current is None:
            images = self._stored if self._stored is not None else (pixels for pixels, _ in self._batches)
            for pixels in images:
                yield pixels.to(device), _begin_with_images
            return
        for held in self._held:
            yield torch.zeros_like(held.images, device=device), partial(self._begin, held.outputs)

    def reach(self, layer: str) -> None:
        """Start later passes at the last waypoint before a layer whose outputs can be stored.

        All layers that run before `layer` must have their final weights.
        """
        past = -1 if self._current is None else self._current.end
        start = self._starts.get(layer, -1)
        passed = [way for way in self._waypoints if past < way.end < start]
        passed = [way for way in passed if way.size * self.images <= self._max_bytes]
        if not passed:
            return
        way = max(passed, key=lambda way: way.end)
        held = []
        for images, begin in self:
            outputs = []
            for network in self._networks:
                with begin(network):
                    outputs.append(run_until(network, way, images))
            held.append(HeldBatch(images.to("meta"), tuple(outputs)))
        self._current = way
        self._held = held

    def _begin(
        self, outputs: Sequence[Mapping[str, Any]], network: IsoPruneForImageClassification
    ) -> AbstractContextManager[None]:
        return replaced_outputs(network, outputs[self._networks.index(network)])


def _begin_with_images(network: IsoPruneForImageClassification) -> AbstractContextManager[None]:
    return replaced_outputs(network, {})
