"""The stage that reads checkpoints of the reference implementation."""

from typing import Any

from accelerate import Accelerator

from isoprune_hf.checkpoint.folder import check_output
from isoprune_hf.commands.results import Answer, summarize, write_folder
from isoprune_hf.legacy.convert import convert_file
from isoprune_hf.legacy.tree import Weights


def run_convert(
    accelerator: Accelerator,
    file: str,
    output: str,
    base: str | None,
    model_args: dict[str, Any],
    weights: Weights,
    overwrite: bool,
) -> Answer:
    """Convert a pickled module, without executing it, and write the folder OUTPUT."""
    folder = check_output(output, overwrite=overwrite)
    converted = convert_file(file, base=base, model_args=model_args, weights=weights)
    write_folder(folder, converted.model, converted.processor, accelerator)
    answer = summarize(converted.model, {}, {}, folder)
    return answer._replace(text="\n".join([*converted.notes, "", answer.text]))
