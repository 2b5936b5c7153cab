"""Sums over the calibration images that survive their process, so that an interrupted scoring can be resumed.

A criterion iterates over `remaining(sums, calibration)` and adds every micro-batch to the sums in place. If these
are `ResumableBatches`, the sums are written at intervals as a snapshot (atomically, verified when read) together with
the number of micro-batches they contain. The same scoring started again reads them and adds the rest in the same
order, so the final sums are equal bit for bit. Every rank writes its own snapshots.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from accelerate.logging import get_logger

from isoprune_hf.checkpoint.snapshots import Snapshot, read_newest_snapshot, remove_snapshots, write_snapshot
from isoprune_hf.errors import DamagedStateError
from isoprune_hf.pruning.calibration.calibration import Batch, Calibration, finite_batches
from isoprune_hf.terminal import with_progress

logger = get_logger(__name__)

RunningSums = Mapping[str, torch.Tensor]


class Repeatable(Protocol):
    """Micro-batches that come in the same order in every pass, and of which the first ones can be skipped."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...

    def starting_at(self, number: int) -> Iterator[Batch]:
        """Iterate from micro-batch `number` on (skip the first `number`)."""


class ResumableBatches:
    """This rank's micro-batches, with a folder in which the sums over them are saved.

    Args:
        batches: The micro-batches.
        folder: Folder of this rank; created when something is saved.
        identity: Description of the sums, the images and the weights as JSON values: a saved state is only resumed
            if it has the same identity.
        minutes: Time between two saved states.
    """

    def __init__(self, batches: Repeatable, folder: Path, identity: Mapping[str, Any], minutes: float):
        self._batches = batches
        self._folder = folder
        self._identity = dict(identity)
        self._minutes = minutes

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def with_key(self, **identity: Any) -> "ResumableBatches":
        """Return a copy whose identity also includes these entries."""
        return ResumableBatches(self._batches, self._folder, {**self._identity, **identity}, self._minutes)

    def remaining(self, sums: RunningSums, *, rank: int = 0) -> Iterator[Batch]:
        """Restore the saved sums, if there are any, and iterate over the micro-batches that they do not include yet.

        The caller adds each micro-batch to `sums`, in place, before it requests the next one. Rank 0 shows a bar.
        """
        shapes = {name: [str(total.dtype), *total.shape] for name, total in sums.items()}
        known = {**self._identity, "sums": shapes, "torch": torch.__version__}
        run = xxhash.xxh3_128(json.dumps(known, sort_keys=True).encode()).hexdigest()
        folder = self._folder / run
        number = written = self._restore(folder, run, sums)
        last = time.monotonic()
        left = with_progress(
            self._batches.starting_at(written), "score", "batch", rank=rank, initial=written, total=len(self._batches)
        )
        for number, batch in enumerate(left, start=written + 1):
            yield batch
            if time.monotonic() - last >= 60 * self._minutes:
                written = self._save(folder, run, sums, number) or written
                last = time.monotonic()
        if 0 < written < number:  # a long pass: the next one, before there is any result, may be interrupted too
            self._save(folder, run, sums, number)

    def _restore(self, folder: Path, run: str, sums: RunningSums) -> int:
        """Copy the newest intact state into the sums; return how many micro-batches it includes."""
        try:
            found = read_newest_snapshot(folder, run=run)
        except DamagedStateError:
            logger.warning(f"scoring restarts from the beginning: no saved state in {folder} is intact")
            remove_snapshots(folder)
            return 0
        if found is None:
            return 0
        for name, total in sums.items():
            total.copy_(found.tensors[name])
        logger.info(f"scoring resumes after micro-batch {found.update}")
        return found.update

    def _save(self, folder: Path, run: str, sums: RunningSums, number: int) -> int:
        """Write the sums over the first `number` micro-batches; return `number`, or 0 if writing failed."""
        tensors = {name: total.detach().cpu() for name, total in sums.items()}
        try:
            write_snapshot(folder, Snapshot(1, number, tensors, {}), run=run)
        except OSError as error:
            reason = error.strerror or error
            logger.warning(f"cannot save the state of the scoring in {folder} ({reason}); scoring continues")
            return 0
        return number


def remaining(sums: RunningSums, calibration: Calibration) -> Iterator[Batch]:
    """Iterate over the micro-batches not yet included in the sums: all of them, unless the batches are resumable."""
    batches = calibration.batches
    if isinstance(batches, ResumableBatches):
        return finite_batches(batches.remaining(sums, rank=calibration.rank))
    return finite_batches(with_progress(batches, "score", "batch", rank=calibration.rank))
