"""Compare the sizes that the recipes of the paper's tables produce with the published ones, as Markdown tables.

    python benchmarks/reference_table.py [RECIPE ...]

Nothing is downloaded: weights are random, and so are the gradients that the criterion of the recipe uses (drawn from
its seed, all on one scale). The first table prunes by the ratios of the recipe, the second to the published size as a
budget. Random gradients only approximate the effect of trained ones: by the mean of a group they spread the removed
channels almost evenly over its layers. `exact` counts all matrix products, `table` counts as the published tables do
(`paper_macs`). Deviations in the first table are those of `table`; budgets use `exact`.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from paper_macs import paper_macs
from torch import nn

from isoprune_hf import PruneRecipe, load_base, prune_model
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.cli.recipe_files import read_recipe
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cost.macs import ModelCost
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.score import score_with_recipe
from isoprune_hf.pruning.scoring.scores import ImportanceScores

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = [
    *("deit_4.2g", "deit_2.6g", "deit_1.2g", "deit_0.6g", "convnext_8.5g", "convnext_4.2g"),
    *("resnet50_2.0g", "resnet101_4.5g", "resnet101_3.8g", "resnet152_4.0g", "swin_4.5g", "mobilenet_v2_0.15g"),
]
COLUMNS = [
    *("recipe", "base GMACs exact / table", "base params (M)", "cut GMACs exact / table", "published", "deviation"),
    *("cut params (M)", "published", "deviation"),
]
BUDGET_COLUMNS = ["recipe", "target GMACs", "cut GMACs exact / table", "below the target", "cut params (M)"]


class RandomGradients(nn.Module):
    """Replaces a base by a network whose loss has random gradients; it ignores the images.

    One of its two logits is a random weighted sum of all weights, minus the current value of that sum.
    """

    def __init__(self, base: IsoPruneForImageClassification, seed: int):
        super().__init__()
        self.config, self.model = base.config, base.model
        generator = torch.Generator().manual_seed(seed)
        self.slopes = {
            name: torch.randn(parameter.shape, generator=generator)
            for name, parameter in base.model.named_parameters()
        }

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        total = sum((self.slopes[name] * weight).sum() for name, weight in self.model.named_parameters())
        return SimpleNamespace(logits=torch.stack([total - total.detach(), torch.zeros(())])[None])


def main(names: list[str]) -> None:
    """Print both tables; the second one when all models are done."""
    print(head(COLUMNS), flush=True)
    budgets = [rows(name) for name in names]
    print(f"\n{head(BUDGET_COLUMNS)}")
    print("\n".join(budgets))


def head(columns: list[str]) -> str:
    """Return the first two lines of a table."""
    return f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}"


def rows(name: str) -> str:
    """Prune a model by ratios and print its row; return the row of the model pruned to the published size."""
    values = read_recipe(RECIPES / f"{name}.yaml")
    recipe, published = PruneRecipe(**values["prune"]), values["expect"]
    base = load_base(recipe.model, pretrained=False, seed=recipe.seed).model
    scores = score(base, recipe)
    by_ratio = prune_model(base, recipe, scores=scores)
    print(show(name, base, by_ratio.model, by_ratio.base_cost, by_ratio.pruned_cost, published), flush=True)
    by_budget = prune_model(base, replace(recipe, target_macs=f"{published['gmacs']}G"), scores=scores)
    cost = by_budget.pruned_cost
    below = 100 * (1 - cost.macs / (published["gmacs"] * 1e9))
    macs = f"{cost.macs / 1e9:.3f} / {paper_macs(by_budget.model) / 1e9:.3f}"
    return f"| {name} | {published['gmacs']:.2f} | {macs} | {below:.2f} % | {cost.params / 1e6:.2f} |"


def score(base: IsoPruneForImageClassification, recipe: PruneRecipe) -> ImportanceScores:
    """Score a base with the criterion of its recipe, using random gradients."""
    return score_with_recipe(
        RandomGradients(base, recipe.seed),
        recipe,
        trace_groups(base, recipe.signature),
        Calibration([(torch.zeros(1, *base.config.image_size), torch.zeros(1, dtype=torch.long))]),
        blocks=() if recipe.remove_blocks is None else find_blocks(base),
    )


def show(
    name: str,
    base: IsoPruneForImageClassification,
    pruned: IsoPruneForImageClassification,
    before: ModelCost,
    after: ModelCost,
    published: dict[str, Any],
) -> str:
    """Return the row of a model that was pruned by ratios."""
    table = paper_macs(pruned) / 1e9
    cells = [
        name,
        f"{before.macs / 1e9:.3f} / {paper_macs(base) / 1e9:.3f}",
        f"{before.params / 1e6:.2f}",
        f"{after.macs / 1e9:.3f} / {table:.3f}",
        *compare(table, published.get("gmacs")),
        f"{after.params / 1e6:.2f}",
        *compare(after.params / 1e6, published.get("params_m")),
    ]
    return f"| {' | '.join(cells)} |"


def compare(value: float, published: float | None) -> tuple[str, str]:
    """Return a published figure and the deviation of a value from it."""
    return ("-", "-") if published is None else (f"{published:.2f}", f"{100 * (value / published - 1):+.1f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or NAMES)
