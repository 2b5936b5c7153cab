"""Bilinear products inside attention heads (`find_pairs`), re-parametrised by invertible matrices (`transform_pairs`).

Queries with keys, and values with the layer that reads them, are products linear in both sides: for any invertible T
of a head, T on the left side and T^-T on the right one cancel. Which rows are queries, keys or values follows from
derivatives by gates, because both sides of a product have the same derivative. A pair is only used if random matrices
T change no logit, so operations between the sides (rotary positions, norms of queries and keys) are detected in any
model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.models.held import with_probe_loss
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.graph.copying import copy_modules, replace_tensor
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring.gate_gradients import gate_gradients
from isoprune_hf.pruning.scoring.gate_points import GatePoint, find_gate_points

_NUM_PROBE_IMAGES = 4  # from which the sides of products are recognised, and equal models


class ProductKind(StrEnum):
    """The two products inside the heads of an attention; the values are how notes name them."""

    QUERIES_AND_KEYS = "queries and keys"
    VALUES = "values"


@dataclass(frozen=True, eq=False)
class HeadColumn:
    """One of the k positions of each channel in one layer: it contains each dim of each head once."""

    point: GatePoint
    column: int

    @property
    def places(self) -> np.ndarray:
        """Positions in the layer's input or output: (channels,)."""
        return np.ascontiguousarray(self.point.places[:, self.column])

    @property
    def parameters(self) -> Iterator[tuple[str, int]]:
        """Parameters that are multiplied by T, each with the dim of the heads."""
        yield self.point.member.parameter, self.point.member.dim
        if self.point.bias is not None:
            yield self.point.bias, 0


class BilinearPair(NamedTuple):
    """Both sides of a product inside the heads of an attention; several columns on the left if heads share keys."""

    group: CoupledGroup
    kind: ProductKind
    left: tuple[HeadColumn, ...]
    right: tuple[HeadColumn, ...]


def find_pairs(model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]) -> list[BilinearPair]:
    """Find the products of each attention that can be re-parametrised.

    Args:
        model: The base; left untouched.
        groups: Groups of `trace_groups`; those without heads, or with norms inside the heads, have no pairs.
    """
    heads = [group for group in groups if group.num_heads and not group.dim_members and group.head_dim > 1]
    images = probe_images(model)
    points = [point for point in find_gate_points(model, heads)[0] if _is_called_layer(model, point)]
    if not points:
        return []
    probe, labels = with_probe_loss(model, _NUM_PROBE_IMAGES)
    gradients, _ = next(gate_gradients(probe, points, [(images, labels)]))
    pairs: list[BilinearPair] = []
    for group in heads:
        columns = {
            HeadColumn(point, column): gradient[:, :, column]
            for point, gradient in zip(points, gradients, strict=True)
            if point.group == group.name
            for column in range(gradient.shape[2])
        }
        pairs += _pair_columns(group, columns)
    return _drop_dependent(model, pairs, images)


def probe_images(model: IsoPruneForImageClassification) -> torch.Tensor:
    """Return random images on which two forms of a model are compared: (4, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NUM_PROBE_IMAGES, *image_size_of(model), generator=generator).to(model.device)


@torch.no_grad()
def transform_pairs(
    model: IsoPruneForImageClassification, transforms: Sequence[tuple[BilinearPair, torch.Tensor]]
) -> IsoPruneForImageClassification:
    """Copy a model with T on the left side and T^-T on the right side of each pair; other weights are shared.

    Args:
        model: Left untouched.
        transforms: Pairs, each with its T of shape (num_heads, head_dim, head_dim) in float64.
    """
    named = dict(model.model.named_parameters())
    transformed: dict[str, torch.Tensor] = {}
    for pair, matrix in transforms:
        inverse = torch.linalg.inv(matrix).mT
        for side, factor in ((pair.left, matrix), (pair.right, inverse)):
            for column in side:
                for name, dim in column.parameters:
                    value = transformed.get(name, named[name].detach().double()).clone()
                    rows = value.movedim(dim, 0)
                    index = column.point.member.index[:, column.column]
                    places = torch.from_numpy(np.ascontiguousarray(index))
                    heads = torch.unflatten(rows[places], 0, (pair.group.num_heads, pair.group.head_dim))
                    rows[places] = torch.einsum("hij,hj...->hi...", factor, heads).flatten(0, 1)
                    transformed[name] = value
    new = {id(named[name]): value for name, value in transformed.items()}
    return copy_modules(
        model, lambda tensor: replace_tensor(tensor, new.get(id(tensor), tensor.detach()).to(tensor.dtype))
    )


def read_logits(model: IsoPruneForImageClassification, images: torch.Tensor) -> torch.Tensor:
    """Compute logits in eval mode, without gradients: (B, labels)."""
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        logits: torch.Tensor = model(pixel_values=images).logits
        return logits


def _is_called_layer(model: IsoPruneForImageClassification, point: GatePoint) -> bool:
    """Check whether a called layer has the channels at one position for each of its inputs or outputs."""
    layer = model.model.get_submodule(point.layer) if point.layer else None
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _pair_columns(group: CoupledGroup, columns: Mapping[HeadColumn, torch.Tensor]) -> Iterator[BilinearPair]:
    """Recognise the sides of the products of one attention from the gate gradients (B, channels) of its columns."""
    readers = tuple(column for column in columns if not column.point.is_output)
    writers = {column: gradient for column, gradient in columns.items() if column.point.is_output}
    if not readers:
        return
    read = reduce(torch.add, (columns[column] for column in readers))
    values = [column for column, gradient in writers.items() if _is_close(gradient, read)]
    if len(values) != 1:
        return
    yield BilinearPair(group, ProductKind.VALUES, tuple(values), readers)
    del writers[values[0]]
    if not writers:
        return
    total = reduce(torch.add, writers.values())
    keys = [column for column, gradient in writers.items() if _is_close(2 * gradient, total)]
    if keys:  # of two equal sides either may be the right one
        left = tuple(column for column in writers if column is not keys[-1])
        yield BilinearPair(group, ProductKind.QUERIES_AND_KEYS, left, (keys[-1],))


def _is_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    largest = float(second.abs().max())
    return largest > 0 and torch.allclose(first, second, rtol=0, atol=1e-3 * largest)


def _drop_dependent(
    model: IsoPruneForImageClassification, pairs: Sequence[BilinearPair], images: torch.Tensor
) -> list[BilinearPair]:
    """Drop the pairs for which random matrices T change the logits; in float64 if the network runs in it."""
    if not pairs:
        return []
    wide, tolerance = (
        copy_modules(model, lambda tensor: replace_tensor(tensor, _widen(tensor)), with_hooks=False),
        1e-7,
    )
    try:
        before = read_logits(wide, images.double())
        images = images.double()
    except LIBRARY_ERRORS:  # its code makes tensors in float32
        wide, tolerance = model, 1e-4
        before = read_logits(wide, images)
    generator = torch.Generator().manual_seed(0)

    def is_free(chosen: Sequence[BilinearPair]) -> bool:
        transforms = []
        for pair in chosen:
            size = pair.group.head_dim
            noise = torch.randn(pair.group.num_heads, size, size, generator=generator, dtype=torch.float64)
            transforms.append((pair, (torch.eye(size) + 0.5 * noise / size**0.5).to(images.device)))
        after = read_logits(transform_pairs(wide, transforms), images)
        return torch.allclose(after, before, rtol=0, atol=tolerance * float(before.abs().max()))

    return list(pairs) if is_free(pairs) else [pair for pair in pairs if is_free([pair])]


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
