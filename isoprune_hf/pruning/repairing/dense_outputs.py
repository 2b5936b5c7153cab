"""Compute the outputs that layers are fitted to (`DenseOutputs`), in few passes through the dense network.

The dense network does not change during a fit, so one pass through it serves all layers whose outputs can be kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.partial_passes.observation import PassStopped
from isoprune_hf.pruning.partial_passes.passes import Passes
from isoprune_hf.pruning.partial_passes.storage import Keep
from isoprune_hf.pruning.partial_passes.waypoints import Given, Stop, kept_outputs, replaced_outputs
from isoprune_hf.pruning.repairing.fitted_rows import size_of
from isoprune_hf.pruning.repairing.layer_calls import FittedLayer
from isoprune_hf.pruning.repairing.residual_stream import ResidualProbe

_MAX_BYTES = 2**30  # of kept outputs, on each rank
_WAYPOINT = ""  # no layer has this name


class DenseOutput(NamedTuple):
    """One call of a layer in the dense network, on the elements that were kept.

    Args:
        output: Its output.
        stream: The tensor that the output is added to, in the layout and scale of the output.
    """

    output: torch.Tensor
    stream: torch.Tensor | None = None

    def stored(self, keep: Keep) -> "DenseOutput":
        """Return the call with its tensors where there is room for them."""
        stream = None if self.stream is None else keep(self.stream, is_copied=False)
        return DenseOutput(keep(self.output, is_copied=False), stream)


class DenseOutputs:
    """The outputs of layers in a network that does not change.

    Args:
        passes: Micro-batches for passes through the network.
        layers: The layers, in the order of execution.
        max_bytes: Largest number of bytes of the kept outputs, unless those of one layer are larger.
    """

    def __init__(
        self,
        passes: Passes,
        layers: Sequence[FittedLayer],
        max_bytes: int = _MAX_BYTES,
    ):
        self._passes, self._max_bytes = passes, max_bytes
        self._coming = list(layers)
        self._kept: dict[str, list[list[DenseOutput]]] = {}

    def of_next(self) -> list[list[DenseOutput]]:
        """Return the outputs of all calls of the next layer, for each micro-batch."""
        if self._coming[0].name not in self._kept:
            self._run()
        return self._kept.pop(self._coming.pop(0).name)

    def _run(self) -> None:
        """Keep the outputs of the next layers: as many as the limit allows, and one at least, in files if need be."""
        sizes = [*accumulate(self._passes.images.count * _bytes_of(layer) for layer in self._coming)]
        count = max(1, sum(size <= self._max_bytes for size in sizes))
        keep = self._passes.storage.place(sizes[count - 1])
        layers, later = self._coming[:count], self._coming[count:]
        self._kept = {layer.name: [] for layer in layers}
        stop = self._passes.stop_before(later[0].name) if later else None
        held = []
        for images, given in self._passes.batches():
            found, outputs = _observe(self._passes.network, layers, images, given, stop)
            for name, calls in found.items():
                self._kept[name].append(calls if keep is None else [call.stored(keep) for call in calls])
            held.append(outputs)
        if stop is not None:
            self._passes.start_at(stop, held)


def _bytes_of(layer: FittedLayer) -> int:
    """Return the bytes of the outputs of all calls of a layer for one image, and of the tensors they are added to."""
    size = size_of(layer.module)
    return layer.positions * size.groups * size.outputs * size.dtype.itemsize * (1 + layer.is_added)


def _observe(
    dense: IsoPruneForImageClassification,
    layers: Sequence[FittedLayer],
    images: torch.Tensor,
    given: Given,
    stop: Stop | None,
) -> tuple[dict[str, list[DenseOutput]], Mapping[str, Any]]:
    """Run a forward pass until the outputs of some layers are found, and their sums.

    Args:
        dense: The network.
        layers: The layers.
        images: (B, C, H, W).
        given: Stored outputs.
        stop: The waypoint at which the next pass will start.

    Returns:
        Layer -> its calls, and the outputs of the waypoint.
    """
    found: dict[str, list[DenseOutput]] = {layer.name: [] for layer in layers}
    waiting = {*found, *(() if stop is None else (_WAYPOINT,))}
    probe = ResidualProbe()

    def on_call(layer: FittedLayer, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        kept = select_kept(output, layer)
        found[layer.name].append(DenseOutput(output.clone() if kept is output else kept))
        if layer.is_added:
            probe.follow(output, partial(on_sum, layer))
        elif len(found[layer.name]) == layer.calls:
            finish(layer.name)

    def on_sum(layer: FittedLayer, other: torch.Tensor) -> None:
        found[layer.name] = [found[layer.name][0]._replace(stream=select_kept(other, layer))]
        finish(layer.name)

    def finish(name: str) -> None:
        waiting.remove(name)
        if not waiting:
            raise PassStopped

    with ExitStack() as stack:
        outputs: Mapping[str, Any] = {}
        if stop is not None:
            outputs = stack.enter_context(kept_outputs(dense, stop, given, partial(finish, _WAYPOINT)))
        for layer in layers:
            handle = dense.model.get_submodule(layer.name).register_forward_hook(partial(on_call, layer))
            stack.callback(handle.remove)
        stack.enter_context(replaced_outputs(dense, given))
        stack.enter_context(probe)
        with suppress(PassStopped):
            dense(pixel_values=images)
    return found, outputs


def select_kept(values: torch.Tensor, layer: FittedLayer) -> torch.Tensor:
    """Select the elements that were kept from the outputs of a dense layer."""
    for dim, kept in layer.rows.items():
        values = values.index_select(dim, kept)
    return values if layer.kept is None else values.index_select(layer.dim, layer.kept)
