"""Who gets which image when: the batches of calibration, evaluation and training for each rank."""

import itertools
import logging
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from isoprune_hf.data.augmentation import Transform, TransformedImages, seed_from
from isoprune_hf.data.dataset import Dataset
from isoprune_hf.data.decoding import Decoding, check_broken
from isoprune_hf.data.pixels import evaluation_transform, normalised
from isoprune_hf.errors import DatasetError, LoaderError

logger = logging.getLogger(__name__)  # also where there is no accelerator


class _Loader(DataLoader):
    """Hands on what is wrong with an image in one line; from a loader process it comes with that process's stack."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        try:
            yield from super().__iter__()
        except DatasetError as error:
            raise DatasetError(
                str(error).strip().splitlines()[-1].partition("DatasetError: ")[2] or str(error)
            ) from error
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise LoaderError(
                f"data: a loader process was lost ({' '.join(str(error).split())}); where memory was short, lower "
                f"data.num_workers (now {self.num_workers}) or finetune.batch_size"
            ) from error


def _collate(samples: Sequence[tuple[int, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Stack samples; 8 bits as they lie in memory, pixel after pixel, since to pull their colours apart takes long."""
    positions, pixels, labels = zip(*samples, strict=True)
    if pixels[0].dtype == torch.uint8:
        stacked = torch.stack([image.movedim(0, -1) for image in pixels]).movedim(-1, 1)
    else:
        stacked = torch.stack(pixels)
    return torch.tensor(positions), stacked, torch.tensor(labels)


def load_batches(images: TransformedImages, batches: Iterable[Sequence[object]], num_workers: int) -> DataLoader:
    """Load batches of what `images` is indexed with."""
    # A generator of its own, since a loader draws from the global one, which dropout uses.
    generator = torch.Generator().manual_seed(0)
    return _Loader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        generator=generator,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_signals,
    )


def calibration_ids(n: int, *, batches: int, batch_size: int, seed: int) -> list[int]:
    """Draw the positions of the calibration sample out of `n`, without repetition; no rank changes them."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: batches * batch_size].tolist()


class CalibrationBatches:
    """This rank's micro-batches of the calibration sample: number k goes to rank k % world.

    Each pass over it gives the same batches, so that every step of a cut can score anew: pixel values of shape (B, C,
    H, W) and labels of shape (B,), on the CPU; the last ones may be fewer.
    """

    def __init__(
        self,
        split: Dataset,
        processor: BaseImageProcessor,
        *,
        batches: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world: int = 1,
        decoding: Decoding | None = None,
    ):
        ids = calibration_ids(len(split), batches=batches, batch_size=batch_size, seed=seed)
        micro_batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
        decoding, self._processor = decoding or Decoding(), processor
        self._images = TransformedImages(split, evaluation_transform(processor, decoding), decoding=decoding)
        self._micro_batches, self._num_workers = micro_batches[rank::world], num_workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the micro-batches without the first ones."""
        broken = 0
        for positions, pixel_values, labels in load_batches(
            self._images, self._micro_batches[number:], self._num_workers
        ):
            for position in broken_positions(positions):
                broken += 1
                # No warning, since those of the other ranks are not shown.
                logger.error(f"calibration: {self._images.describe(position)}")
            check_broken(broken, self._images.decoding, "the calibration sample")
            yield normalised(pixel_values, self._processor), labels


def broken_positions(positions: Tensor) -> list[int]:
    """Return the positions of a batch at which another image stands for one that could not be read."""
    return [~position for position in positions.tolist() if position < 0]


def eval_loader(
    split: Dataset,
    processor: BaseImageProcessor,
    *,
    batch_size: int,
    num_workers: int,
    rank: int,
    world: int,
    decoding: Decoding | None = None,
) -> DataLoader:
    """Load this rank's strided shard: batches of positions (B,), pixel values (B, C, H, W) and labels (B,).

    The decoder `torchvision` gives 8 bits for pixel values, which `normalised` makes such.
    """
    decoding = decoding or Decoding()
    shard = list(range(rank, len(split), world))
    batches = [shard[start : start + batch_size] for start in range(0, len(shard), batch_size)]
    transform = evaluation_transform(processor, decoding)
    images = TransformedImages(split, transform, decoding=decoding, is_counted=True)
    return load_batches(images, batches, num_workers)


def view_loader(
    split: Dataset,
    batches: Sequence[Sequence[int]],
    *,
    transform: Transform,
    decoding: Decoding,
    num_workers: int,
) -> DataLoader:
    """Load the images at some positions in the given batches, as training sees them where nothing is random."""
    return load_batches(TransformedImages(split, transform, (0,), decoding=decoding), batches, num_workers)


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """This rank's share of one epoch.

    Args:
        loader: Its parts of the updates from `start` on, one after the other: positions, pixel values and labels.
        sizes: Samples of each part of the epoch that count: all of it, or none where a short last batch has too few
            samples for all parts; that part then holds a sample that does not count.
        totals: Samples of each update of the epoch over all ranks.
    """

    loader: DataLoader
    sizes: list[int]
    totals: list[int]


def train_batches(
    split: Dataset,
    transform: Transform,
    *,
    batch_size: int,
    parts: int,
    seed: int,
    epoch: int,
    num_workers: int,
    rank: int,
    world: int,
    start: int = 0,
    repeats: int = 1,
    steps: int | None = None,
    drop_last: bool = True,
    decoding: Decoding | None = None,
) -> TrainBatches:
    """Load this rank's parts of the batches of one epoch.

    The order is a permutation from (seed, epoch), with each image `repeats` times in a row, as long as the split. Each
    `batch_size` of it make one update, up to `steps` of them. The copies of an image move to different ends of it;
    then it is cut into `parts` that the ranks take in turn. Images of the updates before `start` are not read.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, epoch))
    order = torch.randperm(len(split), generator=generator).tolist()
    samples = [(position, copy) for position in order for copy in range(repeats)][: len(split)]
    samples = samples[: None if steps is None else steps * batch_size]
    cut = {"batch_size": batch_size, "parts": parts, "rank": rank, "world": world, "drop_last": drop_last}
    micro_batches, sizes, totals = cut_updates(samples, **cut)
    images = TransformedImages(split, transform, (seed, epoch), decoding=decoding)
    return TrainBatches(load_batches(images, micro_batches[start * parts // world :], num_workers), sizes, totals)


def cut_updates(
    samples: Sequence[tuple[int, int]], *, batch_size: int, parts: int, rank: int, world: int, drop_last: bool = True
) -> tuple[list[list[tuple[int, int]]], list[int], list[int]]:
    """Cut the samples of an epoch, (position, copy), into updates and their parts.

    Returns:
        This rank's parts, the samples of each that count, and the samples of each update over all ranks.
    """
    micro_batches, sizes, totals = [], [], []
    for first in range(0, len(samples), batch_size):
        update = samples[first : first + batch_size]
        if len(update) < batch_size and drop_last:
            break
        update.sort(key=lambda sample: sample[1])  # stable: first copies first
        bounds = [len(update) * part // parts for part in range(parts + 1)]
        pieces = [update[low:high] for low, high in itertools.pairwise(bounds)]
        totals.append(len(update))
        sizes += [len(piece) for piece in pieces[rank::world]]
        micro_batches += [piece or 2 * update[:1] for piece in pieces[rank::world]]
    return micro_batches, sizes, totals


def _outlive_signals(worker: int) -> None:
    """Let a loader process leave it to the main process to end the work; a second SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
