"""The stage `frontier`: cut a base to several sizes from one scoring, and measure all of them."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from isoprune_hf.commands.flags import BASE_MODEL, OVERWRITE, SCORES, output_flag
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import DataRecipe, PruneRecipe, recipe_to_dict
from isoprune_hf.recipes.named import as_flags, named_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

_SIZES = "80%,60%,50%,40%,30%"  # those of them that cannot be reached are left out


def run(
    *,
    accelerator: "Accelerator",
    prune: PruneRecipe,
    data: DataRecipe,
    model: str | None,
    sizes: str,
    scores: str | None,
    output: str,
    overwrite: bool,
) -> Answer:
    """Score once, cut to every size, measure all of them, and write table, plot and scores."""
    from isoprune_hf.checkpoint.folder import replace_folder
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.commands.steps.holding_out import settle_holdout
    from isoprune_hf.commands.steps.opening import forget_scoring, open_data, open_inputs
    from isoprune_hf.commands.steps.settling import settle
    from isoprune_hf.commands.steps.sizes import cut_sizes, measure_sizes, record_sizes, tabulate_sizes, write_sizes
    from isoprune_hf.reporting.pictures import check_plotting
    from isoprune_hf.tasks.registry import find_task

    shares = read_sizes(sizes)
    marks = ("frontier.json",)
    with open_target(output, overwrite=overwrite, marks=marks, is_writer=accelerator.is_main_process) as target:
        target.check_inputs({"prune.model": model or prune.model, "data.dataset": data.dataset})
        check_plotting()
        if prune.steps > 1:
            raise RecipeError(f"frontier cuts every size from one scoring: set prune.steps to 1, got {prune.steps}")
        prune = replace(prune, model=model or prune.model, target_macs=None, target_params=None, target_latency=None)
        data = settle_holdout(data, prune.model)
        images = open_data(data, accelerator) if data.dataset else None
        prune, known, reader = settle(prune, images, scores)
        opened = open_inputs(prune, data, images, accelerator, reader=reader, scores=known)
        task = find_task(opened.base.model.config)
        cuts = cut_sizes(opened, shares, output, may_leave_out=sizes == _SIZES)
        rows = measure_sizes(opened, cuts)
        record = record_sizes(opened, cuts, rows)
        if accelerator.is_main_process:
            replace_folder(target, lambda place: write_sizes(place, rows, record, cuts.scores, task))
        forget_scoring(output, accelerator)
        accelerator.wait_for_everyone()
    text = (
        f"{tabulate_sizes(rows)}\n\nThe table, its plot and the scores are in {target.path}. Make a folder of a size "
        f"with:\n\n    {_command_of_one(prune, data, target.path / 'importance.safetensors')}"
    )
    return Answer(text, {"folder": str(target.path), **record})


def _command_of_one(prune: PruneRecipe, data: DataRecipe, scores: Path) -> str:
    """Return the command that cuts the base to one size as this stage did."""
    settings = {**recipe_to_dict(prune), "target_macs": "50%"}
    words = as_flags("prune", named_settings(PruneRecipe, settings, has_images=data.dataset is not None))
    words += as_flags("data", named_settings(DataRecipe, recipe_to_dict(data), has_images=True))
    return " ".join(["isoprune prune", *words, "--scores", shlex.quote(str(scores))])


def read_sizes(text: str) -> tuple[float, ...]:
    """Read the sizes of the cuts.

    Args:
        text: Shares of the base's MACs, separated by commas, such as 80%,50% or 0.8,0.5.

    Raises:
        RecipeError: One is not a number between 0 and 1, or is given twice.
    """
    shares: list[float] = []
    for part in text.split(","):
        try:
            share = float(part.strip().removesuffix("%")) / (100 if part.strip().endswith("%") else 1)
        except ValueError:
            share = float("nan")
        if not 0 < share < 1:
            raise RecipeError(f"--sizes must be shares between 0% and 100%, such as 80%,50%,30%, got {part.strip()!r}")
        if share in shares:
            raise RecipeError(f"--sizes names {share:g} twice")
        shares.append(share)
    return tuple(shares)


STAGE = Stage(
    name="frontier",
    run=run,
    text="Cut MODEL to several sizes from one scoring and write a table, a plot and the scores to OUTPUT: MACs, "
    "parameters, latency on this machine and, with a data set, accuracy before finetuning.",
    heading=Heading.MEASURE,
    order=7,
    sections=("prune", "data"),
    flags=(
        BASE_MODEL,
        Flag("sizes", str, _SIZES, "Shares of the base's MACs, separated by commas."),
        SCORES,
        output_flag("output/frontier"),
        OVERWRITE,
    ),
    positional=("model",),
    examples=("isoprune frontier timm/resnet50.a1_in1k --data DIR --output frontier",),
)
