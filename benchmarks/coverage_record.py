"""The record of one model and way: a line of JSON for each finished step, and the kind and place of an error."""

import json
import resource
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from isoprune_hf import IsoPruneError

# Function of `prune_model` -> its stage.
_STAGES = {
    "_trace": "trace",
    "rotate_base": "rotate",
    "score": "score",
    "decide": "solve",
    "cut": "cut",
    "repair": "repair",
    "_check_finite": "finite",
}


class FailedError(Exception):
    """Raised when the result of a step is wrong."""


def require(holds: bool, message: str) -> None:
    """Raise a FailedError unless the condition holds."""
    if not holds:
        raise FailedError(message)


class Record:
    """The record of one model and way: a file with a line of JSON for each finished step."""

    def __init__(self, path: Path):
        self._file: TextIO = path.open("a", encoding="utf-8")

    def add(self, **values: Any) -> None:
        """Write one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Write down the error of the steps in the block, of any type, and their time and memory."""
        start = time.process_time()
        try:
            yield
        except Exception as error:  # noqa: BLE001  # a failure of any type is a result
            self.add(**describe(error))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.add(cpu_s=round(time.process_time() - start, 1), peak_mb=peak // 1024)


def describe(error: BaseException) -> dict[str, Any]:
    """Return the kind of an error, its type and text, the stage of `prune_model`, and the innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    kind = (
        "refused" if isinstance(error, IsoPruneError) else "wrong" if isinstance(error, FailedError) else "traceback"
    )
    found = {"kind": kind, "type": type(error).__name__, "error": " ".join(str(error).split())[:300]}
    names = [frame.name for frame in frames]
    inside = names[names.index("prune_model") :] if "prune_model" in names else []
    stages = [_STAGES[name] for name in inside if name in _STAGES]
    found |= {"step": stages[0]} if stages else {}
    if kind == "traceback":
        line = ([frame for frame in frames if "isoprune_hf/" in frame.filename] or frames)[-1]
        found["at"] = f"{Path(line.filename).name}:{line.lineno} {line.name}"
    return found
