"""The updates of a training epoch: their order, their division among the ranks, and the loading of their images."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from isoprune_hf.data.augmentation import TransformedImages, seed_from
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.loading import ALONE, ImageLoader, LoaderOptions, Ranks
from isoprune_hf.data.pixels import Transform
from isoprune_hf.recipes import FinetuneRecipe


@dataclass(frozen=True)
class EpochOrder:
    """The samples of one epoch of training and their order.

    Args:
        seed: Seed of the training.
        epoch: Number of the epoch.
        parts: Parts that each update is cut into; the ranks take them in turn.
        repeats: Copies of each image (repeated augmentation); the length of the epoch stays the same.
        steps: Maximum number of updates.
        drop_last: Drop a last update that is smaller than the others.
    """

    seed: int
    epoch: int
    parts: int
    repeats: int = 1
    steps: int | None = None
    drop_last: bool = True

    @classmethod
    def of(cls, recipe: FinetuneRecipe, *, epoch: int, parts: int) -> "EpochOrder":
        """Return the order of an epoch of a recipe."""
        return cls(
            recipe.seed,
            epoch,
            parts,
            repeats=recipe.repeated_augmentation,
            steps=recipe.steps_per_epoch,
            drop_last=recipe.drop_last,
        )


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """This rank's share of one epoch.

    Args:
        loader: This rank's parts of the updates from `start` on, one after the other.
        sizes: Number of samples that count in each part of the epoch: all of the part, or 0 if a short last update
            has fewer samples than parts; such a part is loaded with samples that do not count.
        totals: Samples of each update of the epoch over all ranks.
    """

    loader: ImageLoader
    sizes: list[int]
    totals: list[int]


def train_batches(
    split: Rows,
    transform: Transform,
    order: EpochOrder,
    options: LoaderOptions,
    ranks: Ranks = ALONE,
    *,
    start: int = 0,
) -> TrainBatches:
    """Load this rank's parts of the updates of one epoch.

    The epoch is a permutation of the split from (seed, epoch), with each image repeated `order.repeats` times in a
    row, cut to the length of the split. Every `options.batch_size` samples make one update. Within an update the
    copies of an image are moved apart, then it is cut into parts, which the ranks take in turn.

    Images of the updates before `start` are not read.
    """
    generator = torch.Generator().manual_seed(seed_from(order.seed, order.epoch))
    positions = torch.randperm(len(split), generator=generator).tolist()
    samples = [(position, copy) for position in positions for copy in range(order.repeats)][: len(split)]
    samples = samples[: None if order.steps is None else order.steps * options.batch_size]
    cut = cut_updates(
        samples, batch_size=options.batch_size, parts=order.parts, ranks=ranks, drop_last=order.drop_last
    )
    images = TransformedImages(split, transform, (order.seed, order.epoch), decoding=options.decoding)
    remaining = cut.parts[start * order.parts // ranks.world :]
    loader = ImageLoader(images, remaining, num_workers=options.num_workers)
    return TrainBatches(loader, cut.sizes, cut.totals)


class EpochParts(NamedTuple):
    """The samples of an epoch, (position, copy), cut into updates and their parts.

    Args:
        parts: This rank's parts.
        sizes: Number of samples that count in each of them.
        totals: Samples of each update over all ranks.
    """

    parts: list[list[tuple[int, int]]]
    sizes: list[int]
    totals: list[int]


def cut_updates(
    samples: Sequence[tuple[int, int]], *, batch_size: int, parts: int, ranks: Ranks, drop_last: bool = True
) -> EpochParts:
    """Cut the samples of an epoch into updates, and each update into parts."""
    cut = EpochParts([], [], [])
    for first in range(0, len(samples), batch_size):
        update = sorted(
            samples[first : first + batch_size], key=lambda sample: sample[1]
        )  # stable: first copies first
        if len(update) < batch_size and drop_last:
            break
        bounds = [len(update) * part // parts for part in range(parts + 1)]
        pieces = [update[low:high] for low, high in itertools.pairwise(bounds)][ranks.rank :: ranks.world]
        cut.totals.append(len(update))
        cut.sizes.extend(len(piece) for piece in pieces)
        cut.parts.extend(piece or 2 * update[:1] for piece in pieces)
    return cut
