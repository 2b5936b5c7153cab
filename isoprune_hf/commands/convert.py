"""The stage `convert`: turn a checkpoint of the reference implementation into a folder."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from isoprune_hf.commands.flags import OVERWRITE, output_flag
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage

if TYPE_CHECKING:
    from accelerate import Accelerator


def run(
    *,
    accelerator: "Accelerator",
    file: str,
    output: str,
    base: str | None,
    model_args: dict[str, Any],
    weights: Literal["raw", "ema"],
    overwrite: bool,
) -> Answer:
    """Convert a pickled module, whose pickle is read as data, and write the folder OUTPUT."""
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.commands.steps.results import summarize, write_folder
    from isoprune_hf.legacy.convert import convert_file

    with open_target(output, overwrite=overwrite, is_writer=accelerator.is_main_process) as target:
        target.check_inputs({"--file": file, "--base": base})
        converted = convert_file(file, base=base, model_args=model_args, weights=weights)
        write_folder(target, converted.model, converted.processor, accelerator)
    answer = summarize(converted.model, {}, {}, target.path)
    return replace(answer, text="\n".join([*converted.notes, "", answer.text]))


STAGE = Stage(
    name="convert",
    run=run,
    text="Convert a pruned module of the reference implementation, without executing its pickle, and write the folder "
    "OUTPUT.",
    heading=Heading.SHRINK,
    order=5,
    flags=(
        Flag("file", str, None, "File written by torch.save, with a module of timm or torchvision.", required=True),
        output_flag("output/converted"),
        Flag("base", str | None, None, "The dense base, such as timm/NAME, if the file does not name it."),
        Flag("model_args", dict[str, Any], {}, 'Arguments of the base\'s architecture, such as {"img_size": 64}.'),
        Flag("weights", Literal["raw", "ema"], "raw", "Convert the weights, or their moving average."),
        OVERWRITE,
    ),
    positional=("file",),
    examples=("isoprune convert old.pth --output converted",),
)
