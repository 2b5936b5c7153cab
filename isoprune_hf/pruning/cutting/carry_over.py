"""Copy what two cuts of one network share from one to the other: call `carry_over`."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

Masks = Mapping[tuple[str, int], np.ndarray]


@torch.no_grad()
def carry_over(source: nn.Module, source_masks: Masks, target: nn.Module, target_masks: Masks) -> None:
    """Copy the elements of the base that both cuts kept from `source` to `target`, in place.

    Tensors that only one of them has, and those whose shapes do not follow from the masks, are left as they are.

    Args:
        source: A cut of a base, with other weights than the base.
        source_masks: (tensor, dim) -> which elements of the base it kept.
        target: Another cut of the same base.
        target_masks: The same of `target`.
    """
    sources = dict([*source.named_parameters(), *source.named_buffers()])
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        other = sources.get(name)
        if other is None or other.ndim != tensor.ndim:
            continue
        shapes = zip(other.shape, tensor.shape, strict=True)
        masks = ((source_masks.get((name, dim)), target_masks.get((name, dim))) for dim in range(tensor.ndim))
        places = [_common(*of_dim, *sizes) for of_dim, sizes in zip(masks, shapes, strict=True)]
        found = [place for place in places if place is not None]
        if len(found) == tensor.ndim:
            _copy_places(other, tensor, found)


def _copy_places(source: torch.Tensor, target: torch.Tensor, places: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copy elements from places of one tensor to places of another one, in place; both are given for each dim."""
    part = source
    index = []
    for dim, (old, new) in enumerate(places):
        part = part.index_select(dim, torch.from_numpy(old).to(source.device))
        index.append(torch.from_numpy(new).to(target.device).view([-1] + [1] * (target.ndim - dim - 1)))
    target[tuple(index)] = part


def _common(
    source_mask: np.ndarray | None, target_mask: np.ndarray | None, source_size: int, target_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the places of the elements of a dim that both cuts kept, in the one and in the other one.

    Returns:
        None if the sizes do not follow from the masks.
    """
    size = next((len(mask) for mask in (source_mask, target_mask) if mask is not None), source_size)
    source_mask = np.ones(size, dtype=bool) if source_mask is None else source_mask
    target_mask = np.ones(size, dtype=bool) if target_mask is None else target_mask
    if (source_mask.sum(), target_mask.sum()) != (source_size, target_size):
        return None
    both = source_mask & target_mask
    old, new = (np.cumsum(mask)[both] - 1 for mask in (source_mask, target_mask))
    return old, new
