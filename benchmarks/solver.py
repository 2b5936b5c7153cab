"""Solve budgets for large models with the default preset; print deviations and times as rows of a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/solver.py [--models NAME ...] [--round_to 1]

The models have shapes only (meta device) and random scores: the solver needs neither weights nor data. `counted`
compares the exact count of the pruned model with the count that the solver planned. Times are CPU seconds of one
thread.
"""

import argparse
import time

import torch

from isoprune_hf import (
    ImportanceScores,
    IsoPruneConfig,
    IsoPruneForImageClassification,
    PruneRecipe,
    apply_plan,
    cost_model,
    make_plan,
    trace_groups,
)
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.groups import CoupledGroup

NAMES = (
    "deit_base_distilled_patch16_224",
    "swin_base_patch4_window7_224",
    "convnext_base",
    "resnet152",
    "vit_giant_patch14_224",
    "convnext_xxlarge",
)
TARGETS = ({"target_macs": "25%"}, {"target_macs": "50%"}, {"target_params": "50%"})


def main() -> None:
    """Print a row for each model and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, help="architectures of timm")
    parser.add_argument("--round_to", type=int, default=1, help="widths are multiples of this number")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | trace s | budget | target | reached | of the target | counted | solve s |")
    print("|---|---:|---|---:|---:|---:|---|---:|")
    for name in options.models:
        base = {"library": "timm", "architecture": name, "args": {}}
        with torch.device("meta"):
            model = IsoPruneForImageClassification(
                IsoPruneConfig(base=base, num_labels=1000, image_size=[3, 224, 224])
            ).eval()
        start = time.process_time()
        groups = trace_groups(model)
        cost = cost_model(model, groups)
        traced = time.process_time() - start
        generator = torch.Generator().manual_seed(0)
        random = {group.name: torch.rand(group.channels, generator=generator) for group in groups}
        scores = ImportanceScores(random, "gate_fisher_joint", "", {})
        for target in TARGETS:
            recipe = PruneRecipe(round_to=options.round_to, **target)
            print(f"| timm/{name} | {traced:.1f} {row(model, groups, cost, scores, recipe)}", flush=True)


def row(
    model: IsoPruneForImageClassification,
    groups: tuple[CoupledGroup, ...],
    cost: CostModel,
    scores: ImportanceScores,
    recipe: PruneRecipe,
) -> str:
    """Solve one budget, prune, count, and return the row."""
    start = time.process_time()
    plan = make_plan(groups, scores, recipe, cost=cost)
    solved = time.process_time() - start
    figure, share = ("macs", recipe.target_macs) if recipe.target_macs else ("params", recipe.target_params)
    wanted = plan.achieved["base"][figure] * float(str(share).rstrip("%")) / 100
    reached = plan.achieved["pruned"][figure]
    counted = apply_plan(model, plan, groups).config.cost["pruned"]
    unit, scale = ("G", 1e9) if figure == "macs" else ("M", 1e6)
    return (
        f"| {figure} {share} | {wanted / scale:.3f} {unit} | {reached / scale:.3f} {unit} | "
        f"{100 * reached / wanted:.2f} % | {'equal' if counted == plan.achieved['pruned'] else 'DIFFERENT'} "
        f"| {solved:.2f} |"
    )


if __name__ == "__main__":
    main()
