"""Budget of work for one file: `Work`."""

from isoprune_hf.errors import CheckpointError
from isoprune_hf.limits import MAX_PICKLE_STEPS


class Work:
    """Counts steps, and ends at `MAX_PICKLE_STEPS`: an entry that is read again and again costs each time."""

    def __init__(self) -> None:
        self._left = MAX_PICKLE_STEPS

    def spend(self, steps: int) -> None:
        """Count steps.

        Raises:
            CheckpointError: They are too many.
        """
        self._left -= steps
        if self._left < 0:
            raise CheckpointError(f"takes more than {MAX_PICKLE_STEPS:,} steps to read")
