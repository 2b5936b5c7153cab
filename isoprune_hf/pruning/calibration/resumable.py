"""Sums over the calibration images that outlive their process: a scoring goes on where it was killed.

What is added up over micro-batches is written from time to time, with the number of those that are in it, as the
snapshots of a training are: whole or not at all, verified when read. The same scoring adds the rest to it, in the same
order, so the sums are the same to the bit. Each rank keeps its own.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from accelerate.logging import get_logger

from isoprune_hf.checkpoint.snapshots import Snapshot, read_newest_snapshot, remove_snapshots, write_snapshot
from isoprune_hf.errors import DamagedStateError

logger = get_logger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]
Sums = Mapping[str, torch.Tensor]


class Repeatable(Protocol):
    """Micro-batches that every pass gives in the same order, from any of them on."""

    def __iter__(self) -> Iterator[Batch]: ...

    def starting_at(self, number: int) -> Iterator[Batch]:
        """Give them without the first ones."""


class KeptBatches:
    """This rank's micro-batches, and a folder that keeps what is added up over them.

    Args:
        batches: The micro-batches.
        folder: Of this rank; made when there is something to keep.
        identity: What is added up, of which images and weights, as JSON can say it: nothing else goes on from it.
        minutes: Time between two writings.
    """

    def __init__(self, batches: Repeatable, folder: Path, identity: Mapping[str, Any], minutes: float):
        self._batches, self._folder, self._identity, self._minutes = batches, folder, dict(identity), minutes

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def of(self, **identity: Any) -> "KeptBatches":
        """Give the same micro-batches for sums that more is known of."""
        return KeptBatches(self._batches, self._folder, {**self._identity, **identity}, self._minutes)

    def left_for(self, sums: Sums) -> Iterator[Batch]:
        """Give the micro-batches that are not in the sums yet; what was kept is put into them first.

        The caller adds each micro-batch to the sums, in place, before it asks for the next.
        """
        shapes = {name: [str(total.dtype), *total.shape] for name, total in sums.items()}
        known = {**self._identity, "sums": shapes, "torch": torch.__version__}
        run = xxhash.xxh3_128(json.dumps(known, sort_keys=True).encode()).hexdigest()
        folder = self._folder / run
        number = written = self._read(folder, run, sums)
        last = time.monotonic()
        for number, batch in enumerate(self._batches.starting_at(written), start=written + 1):
            yield batch
            if time.monotonic() - last >= 60 * self._minutes:
                written = self._write(folder, run, sums, number) or written
                last = time.monotonic()
        if 0 < written < number:  # it took long: another scoring may follow before there is a result
            self._write(folder, run, sums, number)

    def _read(self, folder: Path, run: str, sums: Sums) -> int:
        try:
            found = read_newest_snapshot(folder, run=run)
        except DamagedStateError:
            logger.warning(f"the scoring begins anew: no state of it in {folder} is intact")
            remove_snapshots(folder)
            return 0
        if found is None:
            return 0
        for name, total in sums.items():
            total.copy_(found.tensors[name])
        logger.info(f"the scoring goes on behind micro-batch {found.update}")
        return found.update

    def _write(self, folder: Path, run: str, sums: Sums, number: int) -> int:
        """Write the sums over so many micro-batches; returns 0 where that fails."""
        tensors = {name: total.detach().cpu() for name, total in sums.items()}
        try:
            write_snapshot(folder, Snapshot(1, number, tensors, {}), run=run)
        except OSError as error:
            reason = error.strerror or error
            logger.warning(f"the scores so far cannot be kept in {folder} ({reason}); scoring goes on")
            return 0
        return number


def left_for(sums: Sums, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Give the micro-batches that are still to be added to sums: all of them, where nothing is kept."""
    return batches.left_for(sums) if isinstance(batches, KeptBatches) else iter(batches)
