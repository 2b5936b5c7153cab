"""Find where the gates of a group act in a model (`find_gate_points`).

A gate is a number that every use of a channel is multiplied by: 1, and 0 after the channel has been removed. It acts
on the inputs of the layers that read the channel. Of two readers in a row, as a depthwise convolution and the layer
after it, only the last is used: each of them would see the whole channel. The dims of an attention meet other dims in
two products, and no layer reads queries and keys: there a gate acts on what is written and on what is read, and each
side counts half, because a product that is linear in both sides shows the whole channel on either of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.graph.layers import ConvNd, is_depthwise
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.scoring.readers import find_reader


class GatePoint(NamedTuple):
    """A place where the gates of one group act.

    Args:
        group: Name of the group.
        member: Elements that use the channels.
        bias: Parameter that is written with the member's elements, at the same positions.
        layer: Layer that reads or writes them; empty if the weight is used without calling its layer.
        is_output: The layer writes them.
        places: Positions of channel c in the layer's input or output: (channels, k).
    """

    group: str
    member: Member
    bias: str | None
    layer: str
    is_output: bool
    places: np.ndarray


def find_gate_points(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]
) -> tuple[list[GatePoint], dict[str, float]]:
    """Find where the gates of groups act, and the factor by which their derivatives are multiplied.

    Args:
        model: Its `model` owns the layers.
        groups: Groups of `trace_groups`.

    Returns:
        The points of all groups, and group -> factor: 1, or 1/2 if both sides of a product are among the points.
        A group whose channels no layer uses, as those of tokens, has neither.
    """
    points: list[GatePoint] = []
    factors = {}
    for group in groups:
        readers = (_find_reading_point(model, group, member) for member in group.members)
        found = _drop_depthwise(model, [reader for reader in readers if reader is not None])
        factor = 1.0
        if not found or group.is_attention:
            writers = (_find_writing_point(model, group, member) for member in group.members)
            found += [writer for writer in writers if writer is not None]
            factor = 0.5
        if found:
            factors[group.name] = factor
        points += found
    return points, factors


def _drop_depthwise(model: IsoPruneForImageClassification, readers: list[GatePoint]) -> list[GatePoint]:
    """Drop depthwise layers, whose channels reach another reader and are counted there, unless there are no others."""
    return [point for point in readers if not is_depthwise(model.model.get_submodule(point.layer))] or readers


def _find_reading_point(
    model: IsoPruneForImageClassification, group: CoupledGroup, member: Member
) -> GatePoint | None:
    reader = find_reader(model, member)
    if reader is not None:
        return GatePoint(group.name, member, None, reader.layer, False, reader.places)
    name, _, leaf = member.parameter.rpartition(".")
    is_attention = isinstance(model.model.get_submodule(name), nn.MultiheadAttention)
    if is_attention and leaf.endswith("proj_weight") and member.dim == 1:  # it reads without being called
        return GatePoint(group.name, member, None, "", False, member.index)
    return None


def _find_writing_point(
    model: IsoPruneForImageClassification, group: CoupledGroup, member: Member
) -> GatePoint | None:
    name, _, leaf = member.parameter.rpartition(".")
    layer = model.model.get_submodule(name)
    is_layer = leaf == "weight" and isinstance(layer, (nn.Linear, ConvNd))
    is_transposed = leaf == "weight" and isinstance(layer, ConvNd) and layer.transposed
    if member.dim != int(is_transposed):
        return None
    own = dict(layer.named_parameters(recurse=False))  # buffers write no channels
    if leaf not in own or own[leaf].ndim < 2 or find_reader(model, member) is not None:
        return None
    siblings = [other.parameter for other in group.members if other.parameter.rpartition(".")[0] == name]
    biases = (other for other in siblings if other.rpartition(".")[2] in own)
    bias = next((other for other in biases if own[other.rpartition(".")[2]].ndim == 1), None)
    return GatePoint(group.name, member, bias, name if is_layer else "", True, member.index)
