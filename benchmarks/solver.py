"""Solve budgets on four big models and print, as rows of a Markdown table, how near they come and what it takes.

    python benchmarks/solver.py

Shapes alone are used (meta device), scores are random: the solver sees neither weights nor data. `counted` is the
exact count of the finished model; it must equal what the solver planned. Times are seconds of one thread here.
"""

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

NAMES = ("deit_base_distilled_patch16_224", "swin_base_patch4_window7_224", "convnext_base", "resnet152")
TARGETS = ({"target_macs": "25%"}, {"target_macs": "50%"}, {"target_params": "50%"})


def main() -> None:
    """Print three rows for each model."""
    torch.set_num_threads(1)
    print("| model | trace s | budget | target | reached | of the target | counted | solve s |")
    print("|---|---:|---|---:|---:|---:|---|---:|")
    for name in NAMES:
        base = {"library": "timm", "architecture": name, "args": {}}
        with torch.device("meta"):
            model = IsoPruneForImageClassification(
                IsoPruneConfig(base=base, num_labels=1000, image_size=[3, 224, 224])
            ).eval()
        start = time.perf_counter()
        groups = trace_groups(model)
        cost = cost_model(model, groups)
        traced = time.perf_counter() - start
        generator = torch.Generator().manual_seed(0)
        random = {group.name: torch.rand(group.channels, generator=generator) for group in groups}
        scores = ImportanceScores(random, "random", "", {})
        for target in TARGETS:
            print(f"| timm/{name} | {traced:.1f} {row(model, groups, cost, scores, target)}", flush=True)


def row(
    model: IsoPruneForImageClassification,
    groups: tuple[CoupledGroup, ...],
    cost: CostModel,
    scores: ImportanceScores,
    target: dict[str, str],
) -> str:
    """Solve one budget, cut and count."""
    start = time.perf_counter()
    plan = make_plan(groups, scores, PruneRecipe(criterion="taylor", **target), cost=cost)
    solved = time.perf_counter() - start
    setting, share = next(iter(target.items()))
    figure = setting.removeprefix("target_")
    wanted = plan.achieved["base"][figure] * float(share[:-1]) / 100
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
