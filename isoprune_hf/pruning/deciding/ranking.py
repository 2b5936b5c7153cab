"""Who leaves at given ratios: isomorphic classes, ranking inside them, floors and rounding."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import torch

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.cost.macs import CostModel, ModelCost
from isoprune_hf.pruning.deciding.reference import threshold_counts
from isoprune_hf.pruning.deciding.rounding import best_units, keep_counts, round_counts, round_down, width_step
from isoprune_hf.pruning.deciding.scopes import check_alike, place_in_block, resolve_rules
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe


@dataclass(frozen=True)
class Ratios:
    """Fractions that leave: of channels, of whole heads, of the dims inside heads, of residual blocks."""

    ratio: float
    head_ratio: float
    head_dim_ratio: float
    block_ratio: float = 0.0

    @classmethod
    def of(cls, recipe: PruneRecipe) -> "Ratios":
        """The ratios of a recipe."""
        head_dim_ratio = recipe.ratio if recipe.head_dim_ratio is None else recipe.head_dim_ratio
        return cls(
            recipe.ratio,
            recipe.head_ratio,
            head_dim_ratio,
            recipe.ratio if recipe.remove_blocks == "auto" else 0.0,
        )

    def scaled(self, share: float) -> "Ratios":
        """The same proportions with `share` as the largest ratio."""
        values = (self.ratio, self.head_ratio, self.head_dim_ratio, self.block_ratio)
        return Ratios(*(value / max(values) * share for value in values))


@dataclass(frozen=True)
class Choice:
    """Counts that stay: channels of plain groups, dims of each head of attention groups; the heads that stay; the
    blocks that leave; and groups that a threshold and rounding alone would have emptied."""

    widths: Mapping[str, int]
    heads: Mapping[str, tuple[int, ...]]
    removed_blocks: tuple[str, ...] = ()
    margins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spared: tuple[str, ...] = ()


Team = tuple[CoupledGroup, ...]


class Ranking:
    """The scores in the order in which channels leave, for one recipe; `choose` answers for any ratios.

    Raises:
        RecipeError: A pattern of the recipe matches nothing, a block that shall leave is none, or groups that a
            uniform layout keeps alike are unlike.
    """

    def __init__(
        self,
        groups: Sequence[CoupledGroup],
        scores: ImportanceScores | None,
        recipe: PruneRecipe,
        blocks: Sequence[ResidualBlock] = (),
    ):
        self.groups = groups
        self.recipe = recipe
        self.rules = resolve_rules(groups, recipe)
        self.blocks = {block.name: block for block in blocks}
        if scores is None:  # what floors and patterns allow does not depend on scores
            scores = ImportanceScores({group.name: torch.zeros(group.channels) for group in groups}, "", "", {})
        self.block_scores = {block.name: scores.blocks.get(block.name, 0.0) for block in blocks}
        self.scores = {g.name: _normalize(scores.scores[g.name].double().numpy(), recipe.normalizer) for g in groups}
        self._sorted = {name: np.sort(values, kind="stable") for name, values in self.scores.items()}
        self._inside = {group.name: _block_of(group, blocks) for group in groups}
        self._fixed_blocks = self._choose_fixed_blocks()
        if recipe.layout == "uniform":
            for team in self.teams(groups):
                check_alike(team, self.rules)

    def choose(self, ratios: Ratios) -> Choice:
        """Counts that stay in every group at the given ratios.

        In each scope exactly round(ratio x channels) leave, as far as the floors allow, the lowest-scored first and
        equal scores in the order of groups and channels; or, by `selection`, all up to a threshold. Widths are rounded
        afterwards.
        """
        removed_blocks = self._fixed_blocks + self._choose_blocks(ratios.block_ratio)
        alive = [group for group in self.groups if self._inside[group.name] not in removed_blocks]
        heads, spared = self._choose_heads(alive, ratios.head_ratio)
        pools: dict[tuple[str, float], list[Team]] = {}
        for team in self.teams(alive):
            pools.setdefault((self.rules[team[0].name].scope, self._ratio(team[0], ratios)), []).append(team)
        widths: dict[str, int] = {}
        margins: dict[str, Mapping[str, float]] = {}
        for (_, pool_ratio), pool in pools.items():
            units = {team[0].name: self.team_units(team, heads) for team in pool}
            floors = {team[0].name: self.floor(team[0]) for team in pool}
            weights = {team[0].name: sum(len(heads.get(group.name, (0,))) for group in team) for team in pool}
            if self.recipe.selection == "threshold":
                counts, margin = threshold_counts(units, floors, pool_ratio)
            else:
                counts, margin = keep_counts(units, floors, pool_ratio, weights)
            allowed = {team[0].name: self.allowed(team[0]) for team in pool}
            if self.recipe.rounding == "down":
                rounded = round_down(counts, allowed)
            else:
                rounded = round_counts(counts, allowed, units, weights)
            widths |= {group.name: rounded[team[0].name] for team in pool for group in team}
            if self.recipe.selection == "threshold":
                spared |= {name for name, count in counts.items() if count < widths[name] < allowed[name][-1]}
            if margin is not None:
                margins[pool[0][0].name] = margin
        return Choice(widths, heads, removed_blocks, margins, tuple(sorted(spared)))

    def keep(self, group: CoupledGroup, choice: Choice) -> tuple[int, ...]:
        """Channels of a group that stay: the best of the group, or of each kept head."""
        width, score = choice.widths[group.name], self.scores[group.name]
        if not group.num_heads:
            return tuple(sorted(best_units(score, width)))
        by_head = score.reshape(group.num_heads, -1)
        kept_heads = choice.heads[group.name]
        if self.shares_dims(group):
            by_head = np.broadcast_to(self._shared(by_head, kept_heads), by_head.shape)
        return tuple(
            head * group.head_dim + dim for head in kept_heads for dim in sorted(best_units(by_head[head], width))
        )

    def removed(self, choice: Choice) -> tuple[dict[str, int], dict[str, int], tuple[str, ...]]:
        """What leaves, as a cost model asks for it: channels, whole heads, blocks."""
        channels, heads = {}, {}
        for group in self.groups:
            if group.name in choice.widths:
                kept = len(choice.heads.get(group.name, ())) or 1
                channels[group.name] = group.channels - choice.widths[group.name] * kept
                heads[group.name] = group.num_heads - kept if group.num_heads else 0
        return channels, heads, choice.removed_blocks

    def cost(self, choice: Choice, cost: CostModel) -> ModelCost:
        """Cost of the model that a choice makes."""
        return cost.cost(*self.removed(choice))

    def allowed(self, group: CoupledGroup) -> list[int]:
        """Widths that a group may have: multiples of `round_to` from the floor on, and its full size."""
        size = group.head_dim or group.channels
        step = width_step(group, self.recipe.round_to)
        floor = self.floor(group)
        return [*range(math.ceil(floor / step) * step, size, step), size]

    def floor(self, group: CoupledGroup) -> int:
        """Channels, or dims of each head, that stay in a group whatever the ratio."""
        size = group.head_dim or group.channels
        if not self.rules[group.name].is_free:
            return size
        return min(size, max(self.recipe.min_keep, size - math.floor(size * self.recipe.max_ratio + 1e-9)))

    def head_floor(self, group: CoupledGroup) -> int:
        """Heads that stay in an attention whatever the ratio."""
        if not self.rules[group.name].is_free:
            return group.num_heads
        return max(1, group.num_heads - math.floor(group.num_heads * self.recipe.max_ratio + 1e-9))

    def units(self, group: CoupledGroup, heads: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """What competes, ascending: channels; in attention, the weakest dims of all kept heads, then the second."""
        if not group.num_heads:
            return self._sorted[group.name]
        by_head = self.scores[group.name].reshape(group.num_heads, -1)
        if self.shares_dims(group):
            return np.sort(self._shared(by_head, heads[group.name]), kind="stable")
        return np.sort(by_head[list(heads[group.name])], axis=1).mean(axis=0)

    def teams(self, groups: Sequence[CoupledGroup]) -> list[Team]:
        """Groups that keep equal widths: each its own; in a uniform layout those at the same place of all blocks."""
        teams: dict[str, list[CoupledGroup]] = {}
        for group in groups:
            name = place_in_block(group.name) if self.recipe.layout == "uniform" else group.name
            teams.setdefault(name, []).append(group)
        return [tuple(team) for team in teams.values()]

    def team_units(self, team: Team, heads: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """What competes for a team, ascending: the mean of the weakest units of its groups, then of the second."""
        return np.mean([self.units(group, heads) for group in team], axis=0)

    def shares_dims(self, group: CoupledGroup) -> bool:
        """Whether all heads drop the same dims: as the recipe says, or because something belongs to a dim of all."""
        return self.recipe.head_dims != "per_head" or bool(group.dim_members)

    def _shared(self, by_head: np.ndarray, kept_heads: tuple[int, ...]) -> np.ndarray:
        """What the dims are worth that all heads drop together: from (num_heads, head_dim) to (head_dim,)."""
        voting = by_head if self.recipe.head_dims == "shared_all" else by_head[list(kept_heads)]
        return voting.mean(axis=0)

    def _ratio(self, group: CoupledGroup, ratios: Ratios) -> float:
        fixed = self.rules[group.name].fixed
        if fixed is not None:
            return fixed
        return ratios.head_dim_ratio if group.num_heads else ratios.ratio

    def _choose_heads(
        self, groups: Sequence[CoupledGroup], head_ratio: float
    ) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Heads that stay in every attention, and the attentions that keep one because of their floor."""
        pools: dict[str, list[Team]] = {}
        for team in self.teams([group for group in groups if group.num_heads]):
            pools.setdefault(self.rules[team[0].name].scope, []).append(team)
        heads: dict[str, tuple[int, ...]] = {}
        spared: set[str] = set()
        for pool in pools.values():
            means = {
                group.name: self.scores[group.name].reshape(group.num_heads, -1).mean(axis=1)
                for team in pool
                for group in team
            }
            floors = {team[0].name: self.head_floor(team[0]) for team in pool}
            units = {team[0].name: np.mean([np.sort(means[g.name]) for g in team], axis=0) for team in pool}
            if self.recipe.selection == "threshold":
                counts, _ = threshold_counts(units, floors, head_ratio)
                spared |= {name for name, count in counts.items() if count < floors[name]}
                counts = {name: max(count, floors[name]) for name, count in counts.items()}
            else:
                counts, _ = keep_counts(units, floors, head_ratio)
            heads |= {
                g.name: tuple(sorted(best_units(means[g.name], counts[team[0].name]))) for team in pool for g in team
            }
        return heads, spared

    def _choose_fixed_blocks(self) -> tuple[str, ...]:
        wanted = self.recipe.remove_blocks
        if isinstance(wanted, list):
            unknown = [name for name in wanted if name not in self.blocks]
            if unknown:
                raise RecipeError(
                    f"prune.remove_blocks: {unknown[0]!r} is no residual block that can leave; this model has "
                    f"{', '.join(self.blocks) or 'none'}"
                )
            return tuple(name for name in self.blocks if name in wanted)
        counts = wanted if isinstance(wanted, dict) else {"*": wanted} if isinstance(wanted, int) else {}
        leaving: set[str] = set()
        for pattern, count in counts.items():
            known = [name for name in self.blocks if fnmatchcase(name, pattern)]
            free = [name for name in self._removable() if name in known and name not in leaving]
            if count > len(free):
                setting = f"remove_blocks[{pattern!r}]" if isinstance(wanted, dict) else "remove_blocks"
                raise RecipeError(
                    f"prune.{setting}: {count} blocks cannot leave; of the {len(known)} residual blocks here "
                    f"{len(free)} can, since one of each stage stays"
                )
            leaving |= set(free[:count])
        return tuple(name for name in self.blocks if name in leaving)

    def _choose_blocks(self, block_ratio: float) -> tuple[str, ...]:
        """Of each kind of block the lowest-scored round(ratio x blocks) leave; one of each stage stays."""
        leaving: set[str] = set()
        for signature in {block.signature for block in self.blocks.values()} if block_ratio else ():
            kind = [name for name in self._removable() if self.blocks[name].signature == signature]
            total = sum(block.signature == signature for block in self.blocks.values())
            leaving |= set(kind[: round(block_ratio * total)])
        return tuple(name for name in self.blocks if name in leaving)

    def _removable(self) -> list[str]:
        """Blocks that may leave, the lowest-scored first: all but the best of a stage that would else be empty."""
        order = sorted(self.blocks, key=lambda name: self.block_scores[name])
        best = {name.rpartition(".")[0]: name for name in order if not self.blocks[name].is_optional}
        return [name for name in order if name not in best.values()]


def _normalize(scores: np.ndarray, normalizer: str) -> np.ndarray:
    alive = scores[scores >= 0]  # those below 0 have left in an earlier step
    divisor = {"none": 1.0, "mean": alive.mean(), "max": alive.max()}[normalizer]
    return scores / divisor if divisor else scores


def _block_of(group: CoupledGroup, blocks: Sequence[ResidualBlock]) -> str | None:
    """The block that holds all parameters of a group."""
    parameters = {member.parameter for member in group.members}
    prefixes = ((block.name, f"{block.name}.") for block in blocks)
    return next((name for name, prefix in prefixes if all(p.startswith(prefix) for p in parameters)), None)
