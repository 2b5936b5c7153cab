"""Training images as a stream: read in the order of their shards, never all of them on this machine.

An epoch is as long as the recipe says. Its order is a function of (seed, epoch, ranks): the shards in a drawn order,
shuffled within a buffer; a rank that comes to the end of its shards goes through them again. So a run goes on exactly
on as many ranks as before, with any number of loader processes. What a map-style data set promises beyond that, that
each image comes once in an epoch and that another number of ranks trains on the same batches, a stream cannot.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from isoprune_hf.data.augmentation import Transform, TransformedImages
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.loading import TrainBatches, cut_updates, load_batches, train_batches
from isoprune_hf.data.sources import only_labels_decoded
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.recipes import FinetuneRecipe

Row = dict[str, Any]
_AGAIN = 2**20  # added to the epoch for each further pass in it


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """A split that is read one row after another.

    Args:
        stream: Rows with the columns `image`, encoded, and `label`.
        num_classes: Labels are below it.
        buffer: Rows that are shuffled at once, on each rank.
    """

    stream: IterableDataset
    num_classes: int
    buffer: int

    def rows(self, seed: int, epoch: int, *, rank: int = 0, world: int = 1) -> Iterator[Row]:
        """Give a rank's rows of one pass.

        Raises:
            DatasetError: A label is none of the classes.
        """
        drawn = self.stream.shuffle(seed=seed, buffer_size=self.buffer)
        drawn.set_epoch(epoch)
        with only_labels_decoded():
            for row in split_dataset_by_node(drawn, rank, world) if world > 1 else drawn:
                if row["label"] is None or not 0 <= row["label"] < self.num_classes:
                    raise DatasetError(
                        f"data: an image of the stream has the label {row['label']}, the classes are 0 to "
                        f"{self.num_classes - 1}"
                    )
                yield row

    def endless(self, seed: int, epoch: int, *, rank: int, world: int) -> Iterator[Row]:
        """Give a rank's rows of one pass, and of further ones behind it.

        Raises:
            DatasetError: There is none.
        """
        for again in itertools.count():
            row = None
            for row in self.rows(seed, epoch + again * _AGAIN, rank=rank, world=world):
                yield row
            if row is None:
                raise DatasetError(f"data: the stream has no image for rank {rank} of {world}")

    def take(self, images: int, seed: int) -> Sequence[Row]:
        """Read the first rows of a drawn order into memory, the same on every rank."""
        return list(itertools.islice(self.rows(seed, 0), images))


class _StreamedImages(TransformedImages):
    """Gives (position, pixel values, label) of a row that comes with its position in the epoch."""

    def __getitem__(self, at: tuple[int, Row]) -> tuple[int, torch.Tensor, int]:
        position, row = at
        self.split = {position: row}
        return super().__getitem__(position)

    def describe(self, position: int) -> str:
        return f"image {position} of the stream could not be read"


class _StreamedBatches:
    """Micro-batches of (position, row): they are read here, in one order, and decoded by the loader processes."""

    def __init__(self, rows: Iterator[Row], micro_batches: Sequence[Sequence[int]]):
        self._rows, self._micro_batches = rows, micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, Row]]]:
        for positions in self._micro_batches:
            yield list(zip(positions, self._rows, strict=False))

    def __len__(self) -> int:
        return len(self._micro_batches)


def count_images(data: ImageData, recipe: FinetuneRecipe) -> int:
    """Count the images that an epoch may have; for a stream, those that the recipe asks for.

    Raises:
        RecipeError: The recipe asks for what needs to know where each image of a stream is.
    """
    if data.buffer is None:
        return len(data.train)
    if recipe.steps_per_epoch is None:
        raise RecipeError(f"data.streaming does not know how long an epoch is: set {recipe.section}.steps_per_epoch")
    wishes = {
        f"{recipe.section}.repeated_augmentation": recipe.repeated_augmentation > 1,
        f"{recipe.section}.teacher_cache": recipe.teacher_cache is not None,
        "data.broken skip": data.decoding.broken == "skip",
    }
    for name, is_asked in wishes.items():
        if is_asked:
            raise RecipeError(f"{name} needs a data set that lies here: leave it out, or set data.streaming false")
    return recipe.steps_per_epoch * recipe.batch_size


def calibration_split(data: ImageData, images: int, seed: int) -> Sequence[Row]:
    """Give the split that a calibration sample is drawn from; of a stream, the first rows of a drawn order."""
    return data.train if data.buffer is None else _streamed(data).take(images, seed)


def _streamed(data: ImageData) -> StreamedSplit:
    return StreamedSplit(data.train, len(data.label_names), data.buffer)


def epoch_batches(
    data: ImageData,
    transform: Transform,
    recipe: FinetuneRecipe,
    *,
    batch_size: int,
    parts: int,
    epoch: int,
    start: int,
    num_workers: int,
    rank: int,
    world: int,
) -> TrainBatches:
    """Load this rank's parts of the batches of one epoch; see `train_batches` for the arguments.

    The rows of a stream for the updates before `start` are read again, and not decoded.
    """
    split = {"batch_size": batch_size, "parts": parts, "rank": rank, "world": world}
    options = {"num_workers": num_workers, "decoding": data.decoding}
    if data.buffer is None:
        options |= {"seed": recipe.seed, "epoch": epoch, "start": start, "repeats": recipe.repeated_augmentation}
        options |= {"steps": recipe.steps_per_epoch, "drop_last": recipe.drop_last}
        return train_batches(data.train, transform, **split, **options)
    samples = [(position, 0) for position in range(recipe.steps_per_epoch * batch_size)]
    pieces, sizes, totals = cut_updates(samples, **split)
    positions = [[position for position, _ in piece] for piece in pieces]
    first = start * parts // world
    rows = _streamed(data).endless(recipe.seed, epoch, rank=rank, world=world)
    rows = itertools.islice(rows, sum(map(len, positions[:first])), None)
    images = _StreamedImages([], transform, (recipe.seed, epoch), decoding=data.decoding)
    return TrainBatches(load_batches(images, _StreamedBatches(rows, positions[first:]), num_workers), sizes, totals)
