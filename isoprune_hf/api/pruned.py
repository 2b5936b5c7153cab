"""The result of `prune`: `Pruned`."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from isoprune_hf.pruning.cost.macs import ModelCost
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.reporting.result_text import describe_result


@dataclass(frozen=True, eq=False, repr=False)
class Pruned:
    """The result of `prune`; its `repr` is a table of costs and widths.

    Args:
        model: The pruned module, of the type of the module that was given, in eval mode.
        plan: The channels that were kept, with costs and notes.
        scores: The scores that the plan was made from.
        groups: The coupled groups of the base.
        base_cost: Cost of the base.
        pruned_cost: Cost of `model`.
        seconds: Wall seconds of trace, rotate, score, solve, cut and repair.
        loss: Name of the loss that the scores are of; None for scores that need no loss.
    """

    model: nn.Module
    plan: PruningPlan
    scores: ImportanceScores
    groups: tuple[CoupledGroup, ...]
    base_cost: ModelCost
    pruned_cost: ModelCost
    seconds: Mapping[str, float]
    loss: str | None = None

    def __repr__(self) -> str:
        """Return MACs, parameters and widths before and after, the loss, and the notes of the plan."""
        table = describe_result(type(self.model).__name__, self.base_cost, self.pruned_cost, self.groups, self.plan)
        return table if self.loss is None else f"{table}\nscored by {self.scores.criterion} of {self.loss}"
