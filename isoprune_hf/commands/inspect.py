"""The stage `inspect`: list the isomorphic classes of a model, and compare what different decisions would cut."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from isoprune_hf.commands.flags import SCORES
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage
from isoprune_hf.errors import RecipeError, WriteError
from isoprune_hf.recipes import DataRecipe, PruneRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from isoprune_hf.checkpoint.target import Target
    from isoprune_hf.reporting.inspection_page import Inspected


def run(
    *,
    accelerator: "Accelerator",
    prune: PruneRecipe,
    data: DataRecipe,
    model: str | None,
    scores: str | None,
    output: str | None,
    html: str | None,
    overwrite: bool,
) -> Answer:
    """List the isomorphic classes of a model; if there can be scores, also compare the alternatives."""
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.commands.steps.comparing import compare_plans, list_classes
    from isoprune_hf.pruning.deciding.alternatives import check_comparable
    from isoprune_hf.reporting.inspection_page import show_inspected
    from isoprune_hf.reporting.pictures import check_plotting

    is_writer, given = accelerator.is_main_process, {"--output": output, "--html": html}
    if output is not None and html is not None and os.path.realpath(output) == os.path.realpath(html):
        raise RecipeError(f"--output and --html are the same file, {output}; choose another name for one of them")
    with ExitStack() as stack:
        files = {}
        for flag, file in given.items():
            if file is not None:
                target = open_target(file, overwrite=overwrite, is_file=True, is_writer=is_writer, flag=flag)
                files[flag] = stack.enter_context(target)
                check_plotting()
        check_comparable(prune)
        name = model or prune.model
        if name is None:
            raise RecipeError("inspect needs a model: pass its name or folder, or a recipe with prune.model")
        prune = replace(prune, model=name)
        can_score = scores is not None or prune.reads_images != "criterion" or data.dataset is not None
        inspected = compare_plans(name, prune, data, scores, accelerator) if can_score else list_classes(name, prune)
        lines = [show_inspected(inspected)]
        if not can_score:
            criterion = prune.settled(has_images=False).criterion
            lines.append(
                f"no scores, so nothing is compared: criterion {criterion} needs --data.dataset; or use scores "
                "of the weights with --prune.criterion l1, or scores of a file with --scores"
            )
        written = _write_files(inspected, files) if is_writer else []
    is_complete = not is_writer or len(written) == len(files)
    code = 0 if is_complete else WriteError.exit_code
    return Answer("\n\n".join([*lines, *written]), inspected.to_dict(), code)


def _write_files(inspected: "Inspected", files: Mapping[str, "Target"]) -> list[str]:
    """Write the requested files, and return a line for each that is written: the others cost no table."""
    from isoprune_hf.checkpoint.folder import replace_file
    from isoprune_hf.commands.steps.comparing import OWN_PLAN
    from isoprune_hf.reporting.inspection_page import build_page
    from isoprune_hf.reporting.ornaments import ornament
    from isoprune_hf.reporting.pictures import describe_cost, draw_classes

    plan, name = inspected.plans.get(OWN_PLAN), Path(inspected.name).name
    title = name if plan is None else f"{name}: {describe_cost(plan)}"
    writers = {
        "--output": ("picture", lambda path: draw_classes(inspected.groups, plan, path, title=title)),
        "--html": ("page", lambda path: path.write_text(build_page(inspected), encoding="utf-8", newline="\n")),
    }
    lines = []
    for flag, target in files.items():
        kind, write = writers[flag]
        with ornament(f"the {kind}", then=f"{target.path} is not written"):
            replace_file(target, write)
            lines.append(f"{kind}: {target.path}")
    return lines


STAGE = Stage(
    name="inspect",
    run=run,
    text="List the isomorphic classes of MODEL and what its plan keeps of each. If scores are available, also compare "
    "what local, global and isomorphic competition and, with losses as scores, the knapsack would cut at the same "
    "MACs (prune.target_macs; default: half).",
    heading=Heading.MEASURE,
    order=6,
    sections=("prune", "data"),
    flags=(
        Flag("model", str | None, None, "Folder of a model, or a name as for prune.model; replaces prune.model."),
        SCORES,
        Flag("output", str | None, None, "PNG file for a picture of the classes."),
        Flag("html", str | None, None, "HTML file for a page with all tables and plots."),
        Flag("overwrite", bool, False, "Replace existing files at OUTPUT and HTML."),
    ),
    positional=("model",),
    examples=("isoprune inspect timm/resnet50.a1_in1k",),
)
