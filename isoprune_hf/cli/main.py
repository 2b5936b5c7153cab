"""The command line: `isoprune [STAGE] [FLAGS]`, the same as `accelerate launch train_accelerate.py`; see `main`."""

import json
import logging
import os
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

from isoprune_hf.cli.failures import Failure, classify, classify_lost_rank, describe_unexpected
from isoprune_hf.cli.help import take_switches
from isoprune_hf.cli.memory import keep_freed_memory
from isoprune_hf.cli.parser import parse
from isoprune_hf.cli.ranks import code_of_failed_rank, is_first_to_fail
from isoprune_hf.cli.table import STAGES
from isoprune_hf.commands.stage import Answer, Stage
from isoprune_hf.errors import Cancelled, Interrupted, RecipeError
from isoprune_hf.extras import naming_extra
from isoprune_hf.hub.waiting import limit_waiting
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.terminal import BesideBars, paint, printable

_SHARDING_KINDS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments to use instead of those of the process.

    Returns:
        The exit code of a stage that did its work: 0, or 1 if a check failed (`doctor`, `plan diff`). Otherwise the
            process exits: bad input with 2, an unexpected error with 3, a `TrainingFault` with its code, Ctrl-C with
            130.
    """
    if arguments is None:  # the process is ours
        keep_freed_memory()
    try:
        words, switches = take_switches(list(sys.argv[1:] if arguments is None else arguments))
        with naming_extra("this command"):
            name, config = parse(words)
            answer = _run(STAGES[name], config, switches)
        if _rank() == 0:
            _deliver(answer, as_json="json" in switches)
    except KeyboardInterrupt:
        sys.exit(Cancelled.exit_code)
    except BrokenPipeError:  # the reader of the output has ended
        raise
    except Exception as error:  # noqa: BLE001 - the last line for every error; the traceback goes to a file
        _fail(_find_failure(error))
    return answer.code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _deliver(answer: Answer, *, as_json: bool) -> None:
    """Print an answer, and store its figures even if nobody reads them any more."""
    try:
        _print(answer, as_json=as_json)
    finally:
        if answer.store is not None:
            answer.store()


def _print(answer: Answer, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dict(answer.figures), indent=2, sort_keys=True), flush=True)
    elif answer.text:
        print(printable(answer.text), flush=True)


def _run(stage: Stage, config: Namespace, switches: set[str]) -> Answer:
    values = {name: config[name] for name in (*stage.sections, *(flag.name for flag in stage.flags))}
    _quiet_libraries(has_switches=bool(switches))
    limit_waiting()
    if stage.is_local:
        return stage.run(**values)
    accelerator = _open_accelerator(values.get("finetune"))
    level = logging.WARNING if "quiet" in switches else logging.INFO
    level = level if accelerator.is_main_process else logging.ERROR
    handler = BesideBars(sys.stderr if "json" in switches else sys.stdout)
    handler.setFormatter(_WithoutRank("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("isoprune_hf").setLevel(level)
    answer = stage.run(accelerator=accelerator, **values)
    accelerator.end_training()  # not after an error: the other ranks would fail over it before this one has reported
    return answer


class _WithoutRank(logging.Formatter):
    """Drops the rank that accelerate writes before each line, since only the main process logs, and escapes names."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record).removeprefix("[RANK 0] "))


def _quiet_libraries(*, has_switches: bool) -> None:
    """Silence other libraries; their progress bars are shown on a terminal, without --quiet and --json."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no annotation here
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if has_switches:
        os.environ["TQDM_DISABLE"] = "1"
    if has_switches or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # nor here
        for library in ("HF_DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _open_accelerator(finetune: FinetuneRecipe | None) -> Accelerator:
    """Open the ranks.

    Raises:
        RecipeError: They would shard the model, or accelerate sees other ranks than were started.
    """
    for kind in _SHARDING_KINDS:
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise RecipeError(
                f"accelerate is set to {kind}, but here each rank has the whole model and a part of the batch: set "
                "distributed_type to MULTI_GPU, or to NO for one process"
            )
    patience = [] if finetune is None else [InitProcessGroupKwargs(timeout=timedelta(minutes=finetune.rank_minutes))]
    # Without `cpu`, processes on a machine without an accelerator would each be rank 0 of 1.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=patience)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise RecipeError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}; on a machine without "
            "a GPU, start them with torchrun"
        )
    return accelerator


def _find_failure(error: Exception) -> Failure:
    """Return how an error is reported. Exits if another rank has failed first and reported."""
    failure = classify(error)
    if failure is not None:
        return failure
    code = code_of_failed_rank()
    if code is not None:
        sys.exit(code)
    return classify_lost_rank(error) or describe_unexpected(error)


def _fail(failure: Failure) -> NoReturn:
    """Exit, with one line on the rank that failed first, or on each one that survived the loss of all who know."""
    is_first = is_first_to_fail(failure.code)
    if is_first is None:
        is_first = failure.is_of_other_rank or _rank() == 0
    if is_first:
        line = printable(" ".join(failure.message.split()))
        was_stopped = failure.code in (Interrupted.exit_code, Cancelled.exit_code)
        kind = "" if was_stopped else f"{paint('error:', 'red', sys.stderr)} "
        print(f"isoprune: {kind}{line}", file=sys.stderr, flush=True)
    sys.exit(failure.code)
