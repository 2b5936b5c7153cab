"""The stage inspect: classes of a model, and the plans that it compares."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers.command_line import refuse, succeed
from helpers.cut_folders import MODEL_ARGS, NAME, OPEN, check_refused
from helpers.marks import one_of_each

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import cost_model
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import TracedGroups, trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe


def open_dense() -> tuple[IsoPruneForImageClassification, TracedGroups]:
    model = load_base(NAME, False, model_args=MODEL_ARGS, num_labels=10).model
    return model, trace_groups(model)


def widths_of(printed: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Cells of the table of groups, from its columns."""
    found = {line.split()[0]: re.split(r"  +", line)[2:] for line in printed.splitlines() if line.split()[:1]}
    return {name: found[name] for name in names}


@pytest.mark.parametrize("given", one_of_each(["name", "folder", "scores"], "folder"))
@pytest.mark.families
def test_compared_plans_equal_those_made_directly(given: str, folders: Path, tmp_path: Path) -> None:
    model, groups = open_dense()
    scores, cost = score_groups(model, groups, criterion="l1"), cost_model(model, groups)
    page = tmp_path / "page.html"
    arguments = ["inspect", folders / "large" if given == "folder" else NAME, "--html", page, "--prune.round_to", "4"]
    arguments += ["--prune.head_ratio", "0.25"]
    if given == "scores":
        scores.save(tmp_path / "scores.safetensors")
        arguments += [*OPEN, "--scores", tmp_path / "scores.safetensors"]
    elif given == "name":
        arguments += [*OPEN, "--prune.criterion", "l1"]
    else:
        arguments += ["--prune.criterion", "l1"]
    printed = succeed(*arguments)
    # A folder is compared at the MACs of its own plan, which is the first column.
    own = PruningPlan.load(folders / "large") if given == "folder" else None
    target = "50%" if own is None else own.achieved["pruned"]["macs"]
    plans = [] if own is None else [own]
    for scope in ("local", "global", "isomorphic"):
        recipe = PruneRecipe(criterion="l1", scope=scope, target_macs=target, round_to=4, head_ratio=0.25)
        plans.append(make_plan(groups, scores, recipe, cost=cost))
    cells = widths_of(printed, [group.name for group in groups])
    for group in groups:
        expected = []
        for plan in plans:
            kept, heads = (
                len(plan.kept.get(group.name, range(group.channels))),
                len(plan.heads.get(group.name, "4444")),
            )
            expected.append(f"{heads} x {kept // heads}" if group.num_heads else str(kept))
        assert cells[group.name][-len(plans) :] == expected
        assert group.name in page.read_text()
    assert printed.endswith(f"page: {page}\n") and "no scores" not in printed


def test_inspect_scores_from_images(tmp_path: Path) -> None:
    data = ["--data.dataset", "digits", "--prune.calibration_batches", "1", "--prune.batch_size", "4"]
    printed = succeed("inspect", NAME, *OPEN, *data, "--prune.target_macs", "80%", "--prune.round_to", "1")
    assert "scores by trial_loss\n" in printed and ", 80.0% of the base\n" in printed


BAD_INPUT: dict[str, tuple[list[str], list[str]]] = {
    "no model": (["inspect"], ["inspect needs a model"]),
    "page that exists": (["inspect", NAME, "--html", "@small/README.md"], ["--html", "README.md exists"]),
    "picture that exists": (["inspect", NAME, "--output", "@small/README.md"], ["--output", "README.md exists"]),
    "budget that is not MACs": (
        ["inspect", NAME, *OPEN, "--prune.target_params", "50%"],
        ["set prune.target_macs, not prune.target_params"],
    ),
    "budget out of reach": (
        ["inspect", NAME, *OPEN, "--prune.criterion", "l1", "--prune.target_macs", "1%"],
        ["target_macs", "cannot be reached"],
    ),
    "plan of other weights": (
        ["inspect", "@mixed", "--prune.criterion", "l1"],
        ["was made on other weights than those of timm/vit_tiny"],
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(kind: str, folders: Path, tmp_path: Path) -> None:
    check_refused(*BAD_INPUT[kind], folders, tmp_path)


def test_picture_and_page_need_two_files(tmp_path: Path) -> None:
    same = (tmp_path / "a.png", tmp_path / "." / "a.png")
    assert "--html" in refuse("inspect", "timm/resnet18", "--output", same[0], "--html", same[1])
