"""The products inside the heads of an attention that are linear in both sides: queries with keys, values with what
reads them.

For any invertible T of a head, T on the left side and T^-T on the right one cancel. Which rows are queries, keys or
values is seen from derivatives by gates: both sides of a product see all of it. It is believed only if random T change
no logit, so nothing that lies between (rotary positions, norms of queries and keys) goes unnoticed, in any model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.graph.copying import copy_modules
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.scoring.gate_gradients import gate_gradients
from isoprune_hf.pruning.scoring.gate_points import GatePoint, find_gate_points

_IMAGES = 4  # that roles and equality are judged by
KINDS = ("queries and keys", "values")


@dataclass(frozen=True, eq=False)
class Slot:
    """Where one layer holds each dim of each head once: one of the k positions of its channels."""

    end: GatePoint
    column: int

    @property
    def places(self) -> np.ndarray:
        """Positions in the layer's input or output: (channels,)."""
        return np.ascontiguousarray(self.end.places[:, self.column])

    @property
    def parameters(self) -> Iterator[tuple[str, int]]:
        """Parameters that turn with the slot, each with the dim that the heads lie on."""
        yield self.end.member.parameter, self.end.member.dim
        if self.end.bias is not None:
            yield self.end.bias, 0


class Pair(NamedTuple):
    """Both sides of a product inside the heads of an attention; several slots where query heads share keys."""

    group: CoupledGroup
    kind: str
    left: tuple[Slot, ...]
    right: tuple[Slot, ...]


def find_pairs(model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]) -> list[Pair]:
    """Find the products of each attention whose sides may turn.

    Args:
        model: The base; left untouched.
        groups: Groups of `trace_groups`; those without heads, or with norms inside them, have none.
    """
    heads = [group for group in groups if group.num_heads and not group.dim_members and group.head_dim > 1]
    images = probe_images(model)
    ends = [end for end in find_gate_points(model, heads)[0] if _is_held(model, end)]
    if not ends:
        return []
    labels = torch.arange(_IMAGES, device=images.device) % model.config.num_labels
    gradients, _ = next(gate_gradients(model, ends, [(images, labels)]))
    pairs = []
    for group in heads:
        slots = {
            Slot(end, column): gradient[:, :, column]
            for end, gradient in zip(ends, gradients, strict=True)
            if end.group == group.name
            for column in range(gradient.shape[2])
        }
        pairs += _pair(group, slots)
    return _check(model, pairs, images)


def probe_images(model: IsoPruneForImageClassification) -> torch.Tensor:
    """Images of noise by which two forms of a model are compared: (4, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_IMAGES, *model.config.image_size, generator=generator).to(model.device)


def _is_held(model: nn.Module, end: GatePoint) -> bool:
    """Whether a layer that is called holds the channels, one position for each of its inputs or outputs."""
    layer = model.model.get_submodule(end.layer) if end.layer else None
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _pair(group: CoupledGroup, slots: Mapping[Slot, torch.Tensor]) -> Iterator[Pair]:
    readers = tuple(slot for slot in slots if not slot.end.is_output)
    writers = {slot: gradient for slot, gradient in slots.items() if slot.end.is_output}
    read = sum(slots[slot] for slot in readers)
    values = [slot for slot, gradient in writers.items() if readers and _is_close(gradient, read)]
    if len(values) != 1:
        return
    yield Pair(group, "values", tuple(values), readers)
    del writers[values[0]]
    total = sum(writers.values())
    keys = [slot for slot, gradient in writers.items() if _is_close(2 * gradient, total)]
    if keys:  # of two equal sides either may be the right one
        yield Pair(group, "queries and keys", tuple(slot for slot in writers if slot is not keys[-1]), (keys[-1],))


def _is_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    largest = float(second.abs().max())
    return largest > 0 and torch.allclose(first, second, rtol=0, atol=1e-3 * largest)


def _check(model: IsoPruneForImageClassification, pairs: Sequence[Pair], images: torch.Tensor) -> list[Pair]:
    """Keep the pairs that may turn: random T change no logit in float64."""
    wide = copy_modules(model, lambda tensor: replace_tensor(tensor, _widen(tensor)), with_hooks=False)
    images = images.double()
    before = read_logits(wide, images)
    generator = torch.Generator().manual_seed(0)

    def is_free(chosen: Sequence[Pair]) -> bool:
        turns = []
        for pair in chosen:
            size = pair.group.head_dim
            noise = torch.randn(pair.group.num_heads, size, size, generator=generator, dtype=torch.float64)
            turns.append((pair, (torch.eye(size) + 0.5 * noise / size**0.5).to(images.device)))
        after = read_logits(turn(wide, turns), images)
        return torch.allclose(after, before, rtol=0, atol=1e-7 * float(before.abs().max()))

    return list(pairs) if is_free(pairs) else [pair for pair in pairs if is_free([pair])]


@torch.no_grad()
def turn(
    model: IsoPruneForImageClassification, turns: Sequence[tuple[Pair, torch.Tensor]]
) -> IsoPruneForImageClassification:
    """Copy a model with T on the left side and T^-T on the right side of each pair; other weights are shared.

    Args:
        model: Left untouched.
        turns: Pairs, each with its T of shape (num_heads, head_dim, head_dim) in float64.
    """
    named = dict(model.model.named_parameters())
    turned: dict[str, torch.Tensor] = {}
    for pair, matrix in turns:
        inverse = torch.linalg.inv(matrix).mT
        for side, factor in ((pair.left, matrix), (pair.right, inverse)):
            for slot in side:
                for name, dim in slot.parameters:
                    value = turned.get(name, named[name].detach().double()).clone()
                    rows = value.movedim(dim, 0)
                    places = torch.from_numpy(np.ascontiguousarray(slot.end.member.index[:, slot.column]))
                    held = rows[places].unflatten(0, (pair.group.num_heads, pair.group.head_dim))
                    rows[places] = torch.einsum("hij,hj...->hi...", factor, held).flatten(0, 1)
                    turned[name] = value
    new = {id(named[name]): value for name, value in turned.items()}
    return copy_modules(
        model, lambda tensor: replace_tensor(tensor, new.get(id(tensor), tensor.detach()).to(tensor.dtype))
    )


def replace_tensor(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Give a value the kind of the tensor that it takes the place of: a parameter, or not."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def read_logits(model: IsoPruneForImageClassification, images: torch.Tensor) -> torch.Tensor:
    """Logits in eval mode, without gradients: (B, labels)."""
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        return model(pixel_values=images).logits


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
