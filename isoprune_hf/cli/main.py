"""The command line: `isoprune [STAGE] [FLAGS]`, and the same for `accelerate launch train_accelerate.py`."""

import importlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env
from jsonargparse import Namespace
from transformers.utils import logging as transformers_logging

from isoprune_hf.cli.help import take_switches
from isoprune_hf.cli.parser import parse
from isoprune_hf.cli.table import STAGES
from isoprune_hf.commands.results import Answer
from isoprune_hf.errors import (
    Cancelled,
    Interrupted,
    IsoPruneError,
    LostRankError,
    MemoryFault,
    RecipeError,
    TrainingFault,
)
from isoprune_hf.extras import naming_extra
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.terminal import paint

_FAILED, _CODE = "isoprune/failed", "isoprune/code"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Instead of those of the process.

    Returns:
        0: done; 1: done, and what was looked for is not so (`doctor`, `plan diff`). Bad input exits with 2, a training
            that cannot go on with the code of its `TrainingFault`, Ctrl-C with 130.
    """
    try:
        words, switches = take_switches(list(sys.argv[1:] if arguments is None else arguments))
        with naming_extra("this"):
            stage, config = parse(words)
            answer = _run(stage, config, switches)
    except TrainingFault as error:
        _fail(str(error), error.exit_code)
    except IsoPruneError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if _is_of_memory(error):
            full = MemoryFault(
                "the memory does not suffice, and nothing was made smaller by itself; saved states stay; take "
                "smaller --prune.batch_size (scores) or --data.batch_size (evaluation); for the same training more "
                "ranks, --finetune.grad_accumulation, --finetune.grad_checkpointing true or --finetune.precision bf16"
            )
            _fail(str(full), full.exit_code)
        notes = _notes_of_ranks()
        if notes is not None and notes.check([_CODE]):
            sys.exit(int(notes.get(_CODE)))  # this rank lost the one that failed, which has said why
        if not _is_of_a_lost_rank(error):
            raise
        lost = LostRankError(
            "another rank was lost, or has not answered for finetune.rank_minutes; the states that were saved stay, "
            f"and the same command continues ({(str(error).splitlines() or [''])[0][:200]})"
        )
        _fail(str(lost), lost.exit_code)
    if os.environ.get("RANK", "0") == "0":
        _show(stage, answer, as_json="json" in switches)
    return answer.code


def _show(stage: str, answer: Answer, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dict(answer.figures), indent=2, sort_keys=True))
    elif stage == "doctor":
        for verdict, look in (("ok  ", "green"), ("FAIL", "red")):
            painted = paint(verdict, look, sys.stdout)
            answer = answer._replace(text=re.sub(f"^{verdict}", lambda _, new=painted: new, answer.text, flags=re.M))
        print(answer.text)
    elif answer.text:
        print(answer.text)


def _run(stage: str, config: Namespace, switches: set[str]) -> Answer:
    """Run a stage."""
    if "json" in switches and not STAGES[stage].has_figures:
        raise RecipeError(f"isoprune {stage} has no --json: it finds no figures")
    names = [*STAGES[stage].sections.split(), *(flag[0] for flag in STAGES[stage].flags)]
    values = {name: config[name] for name in names}
    _quiet_libraries(is_bare=bool(switches))
    # One process, no log.
    is_local = stage in ("doctor", "plan show", "plan diff", "export", "benchmark", "push")
    places = {"convert": "convert", "evaluate": "evaluate", "frontier": "frontier"}
    places |= dict.fromkeys(("inspect", "plan apply"), "inspect")
    places |= dict.fromkeys(("export", "benchmark", "push"), "deploy")
    place = places.get(stage, "inspect" if is_local else "run")
    name = "all" if stage == "run" else stage.replace(" ", "_")
    work = getattr(importlib.import_module(f"isoprune_hf.commands.{place}"), f"run_{name}")
    if is_local:
        return _answer(work(**values))
    accelerator = _open_accelerator(values.get("finetune"))
    level = logging.WARNING if "quiet" in switches else logging.INFO
    level = level if accelerator.is_main_process else logging.ERROR
    handler = logging.StreamHandler(sys.stderr if "json" in switches else sys.stdout)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("isoprune_hf").setLevel(level)
    answer = _answer(work(accelerator, **values))
    accelerator.end_training()  # not after an error: the other ranks would fail over it before this one has said why
    return answer


def _answer(said: str | Answer) -> Answer:
    return said if isinstance(said, Answer) else Answer(said)


class _Plain(logging.Formatter):
    """Only the main process logs, so its rank need not stand before every line."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).removeprefix("[RANK 0] ")


def _quiet_libraries(*, is_bare: bool) -> None:
    """Leave the terminal to our own lines; bars on a terminal only, and not where the result alone is asked for."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if is_bare:
        os.environ["TQDM_DISABLE"] = "1"
    if is_bare or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _open_accelerator(finetune: FinetuneRecipe | None) -> Accelerator:
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise RecipeError(
                f"accelerate is set to {kind}; here each rank has the whole model and a part of the batch: set its "
                "distributed_type to MULTI_GPU, or NO for one process"
            )
    patience = [] if finetune is None else [InitProcessGroupKwargs(timeout=timedelta(minutes=finetune.rank_minutes))]
    # Without `cpu`, processes on a machine without an accelerator would each be rank 0 of 1.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=patience)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise RecipeError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}; on a machine without "
            "a GPU start them with torchrun"
        )
    return accelerator


def _is_of_memory(error: Exception) -> bool:
    """Say whether memory was refused: a GPU's error has a type, that of the CPU's allocator has words alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _is_of_a_lost_rank(error: RuntimeError) -> bool:
    """Say whether an error tells of another rank: NCCL's has a type, that of gloo has words alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    words = "timed out|connection (closed|reset)|socket|broken pipe"
    return isinstance(error, torch.distributed.DistError) or bool(re.search(words, str(error), re.IGNORECASE))


def _notes_of_ranks() -> torch.distributed.TCPStore | None:
    """Where the ranks leave notes for each other; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return torch.distributed.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
    except (KeyError, ValueError, RuntimeError):
        return None


def _fail(message: str, code: int = 2) -> NoReturn:
    """Print one line, on the rank that fails first."""
    if _is_first_to_fail(code):
        line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(message.split()))
        is_stopped = code in (Interrupted.exit_code, Cancelled.exit_code)
        kind = "" if is_stopped else f"{paint('error:', 'red', sys.stderr)} "
        print(f"isoprune: {kind}{line}", file=sys.stderr, flush=True)
    sys.exit(code)


def _is_first_to_fail(code: int) -> bool:
    """Say whether no rank has failed before this one, and leave the code for those that follow it."""
    notes = _notes_of_ranks()
    try:
        if notes is not None:
            notes.set(_CODE, str(code))
            return notes.add(_FAILED, 1) == 1
    except RuntimeError:  # the rank that kept the notes is gone
        pass
    return os.environ.get("RANK", "0") == "0"
