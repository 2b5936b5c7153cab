"""The stage `inspect`: list the isomorphic classes of a model, and compare what different decisions would cut."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from isoprune_hf.commands.flags import SCORES
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import DataRecipe, PruneRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    from isoprune_hf.checkpoint.folder import replace_file, write_file
    from isoprune_hf.checkpoint.output_check import check_output
    from isoprune_hf.commands.steps.comparing import OWN_PLAN, compare_plans, list_classes
    from isoprune_hf.pruning.deciding.alternatives import check_comparable
    from isoprune_hf.reporting.inspection_page import build_page, show_inspected
    from isoprune_hf.reporting.pictures import check_plotting, draw_classes

    for flag, file in (("--output", output), ("--html", html)):
        if file is not None:
            check_output(file, overwrite=overwrite, is_file=True, flag=flag)
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
        lines.append(
            f"no scores, so nothing is compared: criterion {prune.criterion} needs --data.dataset; or use scores of "
            "the weights with --prune.criterion l1, or scores of a file with --scores"
        )
    if accelerator.is_main_process:
        if output is not None:
            plan = inspected.plans.get(OWN_PLAN)
            title = Path(name).name if plan is None else f"{Path(name).name}: what the plan keeps"
            replace_file(output, lambda temporary: draw_classes(inspected.groups, plan, temporary, title=title))
            lines.append(f"picture: {output}")
        if html is not None:
            write_file(Path(html), build_page(inspected))
            lines.append(f"page: {html}")
    return Answer("\n\n".join(lines), inspected.to_dict())


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
