"""Find the layers that read the channels of a group (`find_readers`), from the members of the group."""

from typing import NamedTuple

import numpy as np
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.graph.layers import ConvNd, is_depthwise
from isoprune_hf.pruning.groups import CoupledGroup, Member

ReadingLayer = nn.Linear | ConvNd


class Reader(NamedTuple):
    """A layer that reads the channels of a group.

    Args:
        layer: Its name, relative to `model.model`.
        places: Positions of channel c in its input: (channels, k).
    """

    layer: str
    places: np.ndarray


def find_reader(model: IsoPruneForImageClassification, member: Member) -> Reader | None:
    """Find the layer that reads the channels of a member, or return None.

    A reader is a linear or a convolution whose weight has the channels on the side of its inputs. A depthwise
    convolution has them on dim 0, as many as it writes. In a grouped one a position on dim 1 is one channel in every
    group.
    """
    name, _, leaf = member.parameter.rpartition(".")
    layer = model.model.get_submodule(name)
    if leaf != "weight" or not isinstance(layer, (nn.Linear, ConvNd)):
        return None
    if isinstance(layer, nn.Linear):
        return Reader(name, member.index) if member.dim == 1 else None
    if is_depthwise(layer):
        return Reader(name, member.index) if member.dim == 0 else None
    if member.dim != int(not layer.transposed):
        return None
    width = layer.in_channels // layer.groups
    starts = np.arange(layer.groups) * width if not layer.transposed else np.zeros(1, dtype=int)
    return Reader(name, (member.index[:, None, :] + starts[:, None]).reshape(len(member.index), -1))


def find_readers(model: IsoPruneForImageClassification, group: CoupledGroup) -> list[Reader]:
    """Find all layers that read the channels of a group; there may be none."""
    return [reader for reader in (find_reader(model, member) for member in group.members) if reader is not None]


def reading_layer(model: IsoPruneForImageClassification, name: str) -> ReadingLayer:
    """Return the linear or convolution of this name.

    Raises:
        TypeError: The module is of another type.
    """
    layer = model.model.get_submodule(name)
    if not isinstance(layer, (nn.Linear, ConvNd)):
        raise TypeError(f"{name} must be a linear or a convolution, got {type(layer).__name__}")
    return layer
