"""The order in which a network uses the channels of groups, and the work that follows: `find_course`."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.graph.layers import ConvNd
from isoprune_hf.pruning.partial_passes.waypoints import Waypoints, find_waypoints
from isoprune_hf.pruning.scoring.gate_points import GatePoint


@dataclass(frozen=True, eq=False)
class Course:
    """The places of groups in one forward pass.

    Args:
        points: Group -> where its channels are used.
        waypoints: Where passes can start.
        work: Linear or convolution -> multiply-adds for one image.
        calls: Linear or convolution -> number of its calls.
    """

    points: Mapping[str, Sequence[GatePoint]]
    waypoints: Waypoints
    work: Mapping[str, int]
    calls: Mapping[str, int]

    def is_called(self, group: str) -> bool:
        """Return whether there are layers that use a group, and all of them are called."""
        points = self.points.get(group, ())
        return bool(points) and all(point.layer in self.calls for point in points)

    def first(self, group: str) -> str:
        """Return the layer that uses a group first."""
        return min((point.layer for point in self.points[group]), key=self.waypoints.starts.__getitem__)

    def in_order(self, groups: Iterable[str]) -> list[str]:
        """Return groups in the order of their first layers."""
        return sorted(groups, key=lambda group: self.waypoints.starts[self.first(group)])

    def is_first(self, groups: Collection[str]) -> bool:
        """Return whether the first of all groups that are called is among some groups."""
        return self.in_order(filter(self.is_called, self.points))[0] in groups

    def share(self, group: str) -> float:
        """Return the share of the multiply-adds of a pass that starts at the last waypoint before a group."""
        way = next(self.waypoints.before(self.first(group)), None)
        after = sum(work for layer, work in self.work.items() if way is None or self.waypoints.starts[layer] > way.end)
        return after / sum(self.work.values())


def find_course(model: IsoPruneForImageClassification, points: Sequence[GatePoint]) -> Course:
    """Find the places of groups by passes of one image; the model must be in eval mode.

    Args:
        model: The network.
        points: Points of `find_gate_points`.
    """
    by_group: dict[str, list[GatePoint]] = {}
    for point in points:
        by_group.setdefault(point.group, []).append(point)
    work: dict[str, int] = {}
    calls: dict[str, int] = {}

    def on_call(name: str, layer: nn.Linear | ConvNd, args: tuple[Any, ...], output: torch.Tensor) -> None:
        work[name] = work.get(name, 0) + output.numel() * layer.weight[0].numel()
        calls[name] = calls.get(name, 0) + 1

    layers = {name: layer for name, layer in model.model.named_modules() if isinstance(layer, nn.Linear | ConvNd)}
    handles = [layer.register_forward_hook(partial(on_call, name)) for name, layer in layers.items()]
    try:
        model(pixel_values=torch.zeros(1, *image_size_of(model), device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    waypoints = find_waypoints(model, {point.layer for point in points if point.layer})
    always = work.keys() & waypoints.starts.keys()  # others run for some images only
    return Course(by_group, waypoints, {name: work[name] for name in always}, {name: calls[name] for name in always})
