"""Training images as a stream: read in the order of their shards, never stored as a whole on this machine.

An epoch has as many updates as the recipe says. Its order is a function of (seed, epoch, ranks): the shards in random
order, with the rows shuffled within a buffer; a rank that has read all of its shards starts over. A run therefore
resumes exactly on the same number of ranks, with any number of loader processes. Unlike a map-style data set, a stream
does not guarantee that each image occurs once per epoch, nor that another number of ranks trains on the same batches.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from isoprune_hf.data.augmentation import ImageSource, Sample
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.datasets_internals import only_labels_decoded
from isoprune_hf.data.decoding import Row, Rows
from isoprune_hf.data.epochs import EpochOrder, TrainBatches, cut_updates, train_batches
from isoprune_hf.data.label_columns import encoder_of
from isoprune_hf.data.loading import ALONE, ImageLoader, LoaderOptions, Ranks
from isoprune_hf.data.pixels import Transform
from isoprune_hf.data.workers import choose_workers
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.recipes import FinetuneRecipe

_PASS_OFFSET = 2**20  # added to the epoch for each further pass over the stream within one epoch


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """A split that is read one row after another.

    Args:
        stream: Rows with the columns `image`, encoded, and `label`.
        num_classes: Number of classes; labels must be below it.
        buffer: Number of rows that are shuffled together, on each rank.
    """

    stream: IterableDataset
    num_classes: int
    buffer: int

    def rows(self, seed: int, epoch: int, ranks: Ranks = ALONE) -> Iterator[Row]:
        """Iterate over a rank's rows of one pass; the lists of several classes are targets, see `encoder_of`.

        Raises:
            DatasetError: A label is not a class.
        """
        shuffled = self.stream.shuffle(seed=seed, buffer_size=self.buffer)
        shuffled.set_epoch(epoch)
        encode = encoder_of(self.stream)
        with only_labels_decoded():
            for row in split_dataset_by_node(shuffled, ranks.rank, ranks.world) if ranks.world > 1 else shuffled:
                labels = [row["label"]] if encode is None else row["label"]
                if labels is None or any(label is None or not 0 <= label < self.num_classes for label in labels):
                    raise DatasetError(
                        f"data: an image of the stream has the label {row['label']}; the classes are 0 to "
                        f"{self.num_classes - 1}"
                    )
                yield row if encode is None else {**row, "label": encode(row["label"])}

    def endless(self, seed: int, epoch: int, ranks: Ranks = ALONE) -> Iterator[Row]:
        """Iterate over a rank's rows, pass after pass.

        Raises:
            DatasetError: The rank has no rows.
        """
        for number in itertools.count():
            row = None
            for row in self.rows(seed, epoch + number * _PASS_OFFSET, ranks):
                yield row
            if row is None:
                raise DatasetError(f"data: the stream has no image for rank {ranks.rank} of {ranks.world}")

    def take(self, images: int, seed: int) -> Sequence[Row]:
        """Read the first rows of a random order into memory, the same on every rank."""
        return list(itertools.islice(self.rows(seed, 0), images))


class _StreamedImages(ImageSource):
    """Samples of rows that come with their position in the epoch."""

    def __getitem__(self, at: tuple[int, Row]) -> Sample:
        position, row = at
        return self.load({position: row}, position)

    def describe(self, position: int) -> str:
        return f"image {position} of the stream could not be read"


class _StreamedBatches:
    """Micro-batches of (position, row): rows are read here, in one order; loader processes only decode them."""

    def __init__(self, rows: Iterator[Row], micro_batches: Sequence[Sequence[int]]):
        self._rows = rows
        self._micro_batches = micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, Row]]]:
        for positions in self._micro_batches:
            yield list(zip(positions, self._rows, strict=False))

    def __len__(self) -> int:
        return len(self._micro_batches)


def count_images(data: ImageData, recipe: FinetuneRecipe) -> int:
    """Return the number of images that an epoch can have; for a stream, the number that the recipe asks for.

    Raises:
        RecipeError: The recipe has a setting that needs random access to the images, and the data are a stream.
    """
    if data.buffer is None:
        return len(map_style_split(data))
    if recipe.steps_per_epoch is None:
        raise RecipeError(
            f"{recipe.section}.steps_per_epoch is not set; data.streaming needs it, since the length of a stream is "
            "unknown"
        )
    unsupported = {
        f"{recipe.section}.repeated_augmentation": recipe.repeated_augmentation > 1,
        f"{recipe.section}.teacher_cache": recipe.teacher_cache is not None,
        "data.broken skip": data.decoding.broken == "skip",
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise RecipeError(f"{name} does not work with a stream; remove it, or set data.streaming: false")
    return recipe.steps_per_epoch * recipe.batch_size


def calibration_split(data: ImageData, images: int, seed: int) -> Rows:
    """Return the split that a calibration sample is drawn from; of a stream, the first rows of a random order."""
    return map_style_split(data) if data.buffer is None else _streamed(data, data.buffer).take(images, seed)


def epoch_batches(
    data: ImageData, transform: Transform, order: EpochOrder, options: LoaderOptions, ranks: Ranks, *, start: int = 0
) -> TrainBatches:
    """Load this rank's parts of the updates of one epoch; see `train_batches` for the arguments.

    The rows of a stream for the updates before `start` are read again, but not decoded.
    """
    if data.buffer is None:
        return train_batches(map_style_split(data), transform, order, options, ranks, start=start)
    if order.steps is None:
        raise RecipeError("finetune.steps_per_epoch is not set; data.streaming needs it")
    samples = [(position, 0) for position in range(order.steps * options.batch_size)]
    cut = cut_updates(samples, batch_size=options.batch_size, parts=order.parts, ranks=ranks)
    positions = [[position for position, _ in part] for part in cut.parts]
    first = start * order.parts // ranks.world
    rows = _streamed(data, data.buffer).endless(order.seed, order.epoch, ranks)
    rows = itertools.islice(rows, sum(map(len, positions[:first])), None)
    images = _StreamedImages(transform, (order.seed, order.epoch), decoding=options.decoding)
    batches = _StreamedBatches(rows, positions[first:])
    workers = choose_workers(options.num_workers, sum(map(len, positions[first:])))
    return TrainBatches(ImageLoader(images, batches, num_workers=workers), cut.sizes, cut.totals)


def map_style_split(data: ImageData) -> Dataset:
    """Return the training split of a data set that is not a stream."""
    if data.train is None or isinstance(data.train, IterableDataset):
        raise DatasetError(f"data: {data.name!r} has no training split; set data.train_split")
    return data.train


def _streamed(data: ImageData, buffer: int) -> StreamedSplit:
    if not isinstance(data.train, IterableDataset):
        raise DatasetError(f"data: {data.name!r} has no training split; set data.train_split")
    return StreamedSplit(data.train, len(data.label_names), buffer)
