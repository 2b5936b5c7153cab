"""The statement of an allocation problem: scores, tied groups, floors and allowed widths.

`choose.allocate` solves it for given ratios; the allocators solve it for a budget.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from isoprune_hf.pruning.cost.macs import RemovedUnits
from isoprune_hf.pruning.deciding.allocation import Allocation, TiedGroups
from isoprune_hf.pruning.deciding.blocks import choose_fixed_blocks
from isoprune_hf.pruning.deciding.rounding import best_units, width_step
from isoprune_hf.pruning.deciding.scopes import GroupRule, check_alike, place_in_block, resolve_rules
from isoprune_hf.pruning.deciding.settings import AllocationSettings, Ratios
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe


class AllocationProblem:
    """The decision that an allocator makes, and the constraints on it.

    Args:
        groups: Groups of `trace_groups`.
        scores: Scores of the groups and blocks; None if only floors and patterns matter.
        settings: Settings of the allocation.
        ratios: Ratios of the recipe.
        blocks: Residual blocks that may be removed.

    Raises:
        RecipeError: A pattern matches nothing, a block cannot be removed, or a uniform layout ties groups that differ.
    """

    def __init__(
        self,
        groups: Sequence[CoupledGroup],
        scores: ImportanceScores | None,
        settings: AllocationSettings,
        ratios: Ratios,
        blocks: Sequence[ResidualBlock] = (),
    ):
        self.groups = groups
        self.settings = settings
        self.ratios = ratios
        self.rules: Mapping[str, GroupRule] = resolve_rules(groups, settings.patterns)
        self.blocks = {block.name: block for block in blocks}
        self.block_scores: Mapping[str, float] = {block.name: 0.0 for block in blocks}
        self.scores = {group.name: np.zeros(group.channels) for group in groups}
        if scores is not None:
            self.block_scores = scores.blocks
            self.scores |= {
                group.name: _normalize(scores.scores[group.name].double().numpy(), settings.normalizer)
                for group in groups
                if group.name in scores.scores
            }
            whole = {
                group.name
                for tied in self.tie(groups)
                if any(group.name not in scores.scores for group in tied.groups)
                for group in tied.groups
            }
            self.rules = {
                name: replace(rule, is_free=False, fixed=None) if name in whole else rule
                for name, rule in self.rules.items()
            }
        self._sorted_scores = {name: np.sort(values, kind="stable") for name, values in self.scores.items()}
        self._enclosing_block = {group.name: _find_block(group, blocks) for group in groups}
        self.fixed_blocks = choose_fixed_blocks(self.blocks, self.block_scores, settings.remove_blocks)
        if settings.is_uniform:
            for tied in self.tie(groups):
                check_alike(tied.groups, self.rules)

    @classmethod
    def from_recipe(
        cls,
        groups: Sequence[CoupledGroup],
        scores: ImportanceScores | None,
        recipe: PruneRecipe,
        blocks: Sequence[ResidualBlock] = (),
    ) -> "AllocationProblem":
        """Build the problem that a recipe states."""
        return cls(groups, scores, AllocationSettings.from_recipe(recipe), Ratios.from_recipe(recipe), blocks)

    def groups_outside(self, removed_blocks: Sequence[str]) -> list[CoupledGroup]:
        """Return the groups that are not inside one of the removed blocks."""
        return [group for group in self.groups if self._enclosing_block[group.name] not in removed_blocks]

    def tie(self, groups: Sequence[CoupledGroup]) -> list[TiedGroups]:
        """Collect the groups that must have equal widths."""
        tied: dict[str, list[CoupledGroup]] = {}
        for group in groups:
            name = place_in_block(group.name) if self.settings.is_uniform else group.name
            tied.setdefault(name, []).append(group)
        return [TiedGroups(tuple(members)) for members in tied.values()]

    def ratio_of(self, group: CoupledGroup, ratios: Ratios) -> float:
        """Return the fraction to remove from a group: its fixed ratio, or that of its kind."""
        fixed = self.rules[group.name].fixed
        if fixed is not None:
            return fixed
        return ratios.head_dim_ratio if group.num_heads else ratios.ratio

    def floor(self, group: CoupledGroup) -> int:
        """Return the smallest width of a group: channels, or dims of each head."""
        size = group.head_dim or group.channels
        return self.settings.widths.floor(size) if self.rules[group.name].is_free else size

    def head_floor(self, group: CoupledGroup) -> int:
        """Return the smallest number of heads of an attention group."""
        return self.settings.widths.head_floor(group.num_heads) if self.rules[group.name].is_free else group.num_heads

    def allowed_widths(self, group: CoupledGroup) -> list[int]:
        """Return the widths that a group may have, ascending: multiples of `round_to` from its floor, and its size."""
        size = group.head_dim or group.channels
        step = width_step(group, self.settings.widths.round_to)
        return [*range(math.ceil(self.floor(group) / step) * step, size, step), size]

    def sorted_units(self, tied: TiedGroups, heads: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """Return the ascending scores of the units that tied groups remove together.

        Unit k is the mean of the k-th weakest unit of each group.

        Args:
            tied: Groups of equal width.
            heads: Attention group -> heads to keep.
        """
        return np.asarray(np.mean([self._sorted_units(group, heads) for group in tied.groups], axis=0))

    def kept_channels(self, group: CoupledGroup, allocation: Allocation) -> tuple[int, ...]:
        """Return the channels of a group to keep, ascending: the best of the group, or of each kept head."""
        width, scores = allocation.widths[group.name], self.scores[group.name]
        if not group.num_heads:
            return tuple(sorted(best_units(scores, width)))
        by_head = scores.reshape(group.num_heads, -1)
        kept_heads = allocation.heads[group.name]
        if self._shares_dims(group):
            by_head = np.broadcast_to(self._shared_dim_scores(by_head, kept_heads), by_head.shape)
        return tuple(
            head * group.head_dim + dim for head in kept_heads for dim in sorted(best_units(by_head[head], width))
        )

    def removed_units(self, allocation: Allocation) -> RemovedUnits:
        """Return what an allocation removes, as a cost model takes it."""
        channels: dict[str, int] = {}
        heads: dict[str, int] = {}
        for group in self.groups:
            if group.name in allocation.widths:
                kept_heads = len(allocation.heads.get(group.name, ())) or 1
                channels[group.name] = group.channels - allocation.widths[group.name] * kept_heads
                heads[group.name] = group.num_heads - kept_heads if group.num_heads else 0
        return RemovedUnits(channels, heads, allocation.removed_blocks)

    def _sorted_units(self, group: CoupledGroup, heads: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """Return ascending scores: of channels, or of the weakest dims of all kept heads, the second weakest, ..."""
        if not group.num_heads:
            return self._sorted_scores[group.name]
        by_head = self.scores[group.name].reshape(group.num_heads, -1)
        if self._shares_dims(group):
            return np.sort(self._shared_dim_scores(by_head, heads[group.name]), kind="stable")
        return np.asarray(np.sort(by_head[list(heads[group.name])], axis=1).mean(axis=0))

    def _shares_dims(self, group: CoupledGroup) -> bool:
        """Check whether all heads drop the same dims: by the settings, or because they share tensors over dims."""
        return self.settings.head_dims != "per_head" or bool(group.dim_members)

    def _shared_dim_scores(self, by_head: np.ndarray, kept_heads: tuple[int, ...]) -> np.ndarray:
        """Average scores (num_heads, head_dim) over heads to (head_dim,): over all heads for shared_all."""
        counted = by_head if self.settings.head_dims == "shared_all" else by_head[list(kept_heads)]
        return np.asarray(counted.mean(axis=0))


def _normalize(scores: np.ndarray, normalizer: str) -> np.ndarray:
    kept = scores[scores >= 0]  # negative scores mark channels that an earlier step removed
    if normalizer == "none" or not len(kept):  # of a group inside a removed block none is left
        return scores
    divisor = kept.mean() if normalizer == "mean" else kept.max()
    return scores / divisor if divisor else scores


def _find_block(group: CoupledGroup, blocks: Sequence[ResidualBlock]) -> str | None:
    """Return the block that contains all parameters of a group."""
    parameters = {member.parameter for member in group.members}
    prefixes = ((block.name, f"{block.name}.") for block in blocks)
    return next((name for name, prefix in prefixes if all(p.startswith(prefix) for p in parameters)), None)
