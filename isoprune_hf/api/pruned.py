"""The result of `prune`: `Pruned`."""

from dataclasses import dataclass

from torch import nn

from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.prune import PruneResult
from isoprune_hf.reporting.result_text import describe_result


@dataclass(frozen=True, eq=False, repr=False)
class Pruned:
    """The result of `prune`; its `repr` is a table of costs and widths.

    Args:
        model: The pruned module, of the type of the module that was given, in eval mode.
        result: Scores, groups, costs and times of the pruning. Its `model` holds `model` as the pipeline runs it.
    """

    model: nn.Module
    result: PruneResult

    @property
    def plan(self) -> PruningPlan:
        """The channels that were kept, with notes and costs."""
        return self.result.plan

    def __repr__(self) -> str:
        """Return MACs, parameters and widths before and after, and the notes of the plan."""
        result = self.result
        name = type(self.model).__name__
        return describe_result(name, result.base_cost, result.pruned_cost, result.groups, result.plan)
