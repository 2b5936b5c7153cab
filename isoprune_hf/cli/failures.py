"""Recognize what ended a stage, as one line and an exit code.

`classify` and `classify_lost_rank` know the errors that a user can correct, `describe_unexpected` takes all others.
"""

import os
import re
from typing import NamedTuple

import torch

from isoprune_hf.cli.report import find_place, write_report
from isoprune_hf.errors import IsoPruneError, LostRankError, MemoryFault, TrainingFault, WriteError

_BAD_INPUT_CODE = 2
_UNEXPECTED_CODE = 3
_SHOWN_LENGTH = 200  # characters of an error of a library
# Errors that have no type of their own, as torch 2.12 to 2.14 words them: the allocator of the CPU raises a plain
# RuntimeError, and so does gloo when it loses another rank. NCCL raises a DistError.
_CPU_ALLOCATOR = "DefaultCPUAllocator"
_GLOO = re.compile("timed out|connection (closed|reset)|socket|broken pipe", re.IGNORECASE)


class Failure(NamedTuple):
    """End of a stage that could not do its work.

    Attributes:
        message: One line for the user.
        code: Exit code of the process.
        is_of_other_rank: The end of another rank has caused it.
    """

    message: str
    code: int
    is_of_other_rank: bool = False


def classify(error: Exception) -> Failure | None:
    """Return how an error of this rank is reported; None for one that the user cannot correct, such as a bug."""
    if isinstance(error, TrainingFault):
        return Failure(str(error), error.exit_code)
    if isinstance(error, IsoPruneError):
        return Failure(str(error), _BAD_INPUT_CODE)
    if _is_out_of_memory(error):
        return Failure(
            "out of memory; reduce --prune.batch_size (scoring) or --data.batch_size (evaluation); to train the same "
            "model, use more ranks, --finetune.grad_accumulation, --finetune.grad_checkpointing true or "
            "--finetune.precision bf16. Saved states are kept",
            MemoryFault.exit_code,
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return Failure(": ".join([error.strerror, *places]), WriteError.exit_code)
    return None


def describe_unexpected(error: Exception) -> Failure:
    """Return how an error is reported that is a bug, of this package or of a library; its details go to a file."""
    text = (str(error).strip().splitlines() or [""])[0][:_SHOWN_LENGTH]
    name = type(error).__name__
    report = write_report(error)
    details = "" if report is None else f" together with {report}, which holds the details"
    return Failure(
        f"unexpected {name}{': ' * bool(text)}{text} ({find_place(error)}); this is a bug: please report it{details}",
        _UNEXPECTED_CODE,
    )


def classify_lost_rank(error: Exception) -> Failure | None:
    """Return how an error is reported that another rank's end has caused on this one; None for others."""
    if _is_lost_rank(error):
        return Failure(
            "a rank failed or did not answer for finetune.rank_minutes; rerun the same command to resume from the "
            f"last saved state ({(str(error).splitlines() or [''])[0][:_SHOWN_LENGTH]})",
            LostRankError.exit_code,
            is_of_other_rank=True,
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)


def _is_lost_rank(error: Exception) -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or bool(_GLOO.search(str(error)))
