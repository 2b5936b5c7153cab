"""Load batches of images, and divide the images of a calibration or an evaluation among the ranks.

`CalibrationBatches`, `eval_loader` and `view_loader` decide which rank loads which images; `ImageLoader` loads them.
The batches of a training epoch are in `epochs.py`.
"""

import logging
import signal
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from isoprune_hf.data.augmentation import ImageSource, Sample, TransformedImages
from isoprune_hf.data.decoding import Decoding, Rows, check_broken
from isoprune_hf.data.pixels import Transform, evaluation_transform, normalised
from isoprune_hf.data.workers import choose_workers
from isoprune_hf.errors import DatasetError, LoaderError

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator


@dataclass(frozen=True)
class Ranks:
    """This process among the processes that share the work.

    Args:
        rank: Number of this process; 0 is the main process.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1


ALONE = Ranks()


@dataclass(frozen=True)
class LoaderOptions:
    """Settings for loading images.

    Args:
        batch_size: Images of a batch on each rank; in training, images of an update over all ranks.
        num_workers: Loader processes on each rank; None chooses them, see `choose_workers`.
        decoding: How images are read; by default, an image that cannot be read is an error.
    """

    batch_size: int = 64
    num_workers: int | None = 0
    decoding: Decoding = field(default_factory=Decoding)

    def for_processor(self, processor: BaseImageProcessor) -> "LoaderOptions":
        """Return the options for images of as many channels as a processor takes."""
        return replace(self, decoding=self.decoding.for_processor(processor))


class ImageBatch(NamedTuple):
    """A batch of samples.

    Args:
        positions: Positions in the split, of shape (B,).
        pixels: Pixel values, or uint8 pixels that `normalised` completes, of shape (B, C, H, W).
        labels: Class indices, of shape (B,); of lists of classes zeros and ones, of shape (B, C).
        is_replacement: Whether the image at the position could not be read, of shape (B,). A tensor of its own, so
            that it passes through loader processes and pinned memory as the others do.
    """

    positions: Tensor
    pixels: Tensor
    labels: Tensor
    is_replacement: Tensor

    @property
    def broken(self) -> list[int]:
        """Positions of the images that could not be read."""
        return self.positions[self.is_replacement].tolist()


class ImageLoader:
    """Loads batches of images, in this process or in loader processes.

    Args:
        images: The images.
        batches: Indices into `images`, batch by batch.
        num_workers: Loader processes; None chooses them.
    """

    def __init__(self, images: ImageSource, batches: Iterable[Sequence[Any]], *, num_workers: int | None):
        self.images = images
        self.num_workers = choose_workers(num_workers, sum(map(len, batches)) if isinstance(batches, Sequence) else 0)
        with warnings.catch_warnings():  # `choose_workers` warns once, not for each loader
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            self._loader = DataLoader(
                images,
                batch_sampler=batches,  # type: ignore[arg-type]  # torch annotates lists; any sequence will do
                num_workers=self.num_workers,
                # Its own generator: a loader draws a seed from the global one otherwise, which dropout uses.
                generator=torch.Generator().manual_seed(0),
                collate_fn=_collate,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_leave_signals_to_main_process,
            )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Iterate over the batches.

        Raises:
            DatasetError: An image cannot be read; one line, also from a loader process.
            LoaderError: A loader process ended.
        """
        try:
            yield from self._loader
        except DatasetError as error:
            _release_loader(error)
            # torch puts the worker's traceback into the message; the last line is the error itself.
            reason = str(error).strip().splitlines()[-1].partition(f"{type(error).__name__}: ")[2] or str(error)
            raise DatasetError(reason) from error
        except RuntimeError as error:
            # torch has no type of its own for this error.
            if not str(error).startswith("DataLoader worker"):
                raise
            _release_loader(error)
            raise LoaderError(
                f"data: a loader process ended unexpectedly ({' '.join(str(error).split())}); if it ran out of "
                f"memory, lower data.num_workers (now {self.num_workers}) or finetune.batch_size"
            ) from error


def _release_loader(error: Exception) -> None:
    """Release the loader that the traceback of its error holds in a cycle, so that its processes end at once.

    The garbage collector would close their queues before they are told to end, and wait ten seconds for each.
    """
    traceback.clear_frames(error.__traceback__)


def _collate(samples: Sequence[Sample]) -> ImageBatch:
    """Stack samples; uint8 pixels are stacked in channels-last order, as they lie in memory, which is faster."""
    positions, pixels, labels, is_replacement = zip(*samples, strict=True)
    if pixels[0].dtype == torch.uint8:
        stacked = torch.stack([image.movedim(0, -1) for image in pixels]).movedim(-1, 1)
    else:
        stacked = torch.stack(pixels)
    targets = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return ImageBatch(torch.tensor(positions), stacked, targets, torch.tensor(is_replacement))


def _leave_signals_to_main_process(worker: int) -> None:
    """Ignore, in a loader process, signals that the main process handles; a second SIGTERM ends the process."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def calibration_ids(n: int, *, batches: int, batch_size: int, seed: int) -> list[int]:
    """Draw the positions of the calibration sample out of `n`, without repetition; the same on every rank."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: batches * batch_size].tolist()


class CalibrationBatches:
    """This rank's micro-batches of the calibration sample: number k belongs to rank k % world.

    Every iteration yields the same batches on the CPU: pixel values of shape (B, C, H, W) and labels as in
    `ImageBatch`. The last batch may be smaller.

    Args:
        split: Images with the columns `image` and `label`.
        processor: Makes the pixel values.
        options: How they are loaded.
        batches: Micro-batches over all ranks.
        seed: Of the sample.
        ranks: The ranks that share the sample.
    """

    def __init__(
        self,
        split: Rows,
        processor: BaseImageProcessor,
        options: LoaderOptions,
        *,
        batches: int,
        seed: int,
        ranks: Ranks = ALONE,
    ):
        options = options.for_processor(processor)
        size = options.batch_size
        ids = calibration_ids(len(split), batches=batches, batch_size=size, seed=seed)
        micro_batches = [ids[start : start + size] for start in range(0, len(ids), size)]
        transform = evaluation_transform(processor, options.decoding)
        self._processor = processor
        self._images = TransformedImages(split, transform, decoding=options.decoding)
        self._micro_batches = micro_batches[ranks.rank :: ranks.world]
        self._num_workers = options.num_workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def starting_at(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate from micro-batch `number` on (skip the first `number`)."""
        broken = 0
        for batch in ImageLoader(self._images, self._micro_batches[number:], num_workers=self._num_workers):
            for position in batch.broken:
                broken += 1
                # Not a warning: warnings of ranks other than the main process are hidden.
                logger.error(f"calibration: {self._images.describe(position)}")
            check_broken(broken, self._images.decoding, "the calibration sample")
            yield normalised(batch.pixels, self._processor), batch.labels


def eval_loader(
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    ranks: Ranks = ALONE,
) -> ImageLoader:
    """Load every `world`-th image of a split, from image `rank` on, in the evaluation transform.

    The decoder `torchvision` yields uint8 pixels, which `normalised` completes.
    """
    options = options.for_processor(processor)
    shard = list(range(ranks.rank, len(split), ranks.world))
    size = options.batch_size
    batches = [shard[start : start + size] for start in range(0, len(shard), size)]
    transform = evaluation_transform(processor, options.decoding)
    images = TransformedImages(split, transform, decoding=options.decoding, keep_labels=True)
    return ImageLoader(images, batches, num_workers=options.num_workers)


def view_loader(
    split: Rows, batches: Sequence[Sequence[int]], transform: Transform, options: LoaderOptions
) -> ImageLoader:
    """Load the given batches of positions in a training transform without randomness."""
    images = TransformedImages(split, transform, (0,), decoding=options.decoding)
    return ImageLoader(images, batches, num_workers=options.num_workers)
