"""Settings of a decision, grouped by use; each value is made from a recipe with `from_recipe`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from isoprune_hf.recipes import PruneRecipe

Normalizer = Literal["none", "mean", "max"]
_ROUNDING_ERROR = 1e-9  # of size x max_ratio, so that 0.7 of 10 channels are 7


@dataclass(frozen=True)
class Ratios:
    """Fractions to remove: of channels, of whole heads, of the dims inside heads, of residual blocks."""

    ratio: float
    head_ratio: float
    head_dim_ratio: float
    block_ratio: float = 0.0

    @classmethod
    def from_recipe(cls, recipe: PruneRecipe) -> "Ratios":
        """Return the ratios of a recipe, with its defaults for dims and blocks resolved."""
        return cls(
            ratio=recipe.ratio,
            head_ratio=recipe.head_ratio,
            head_dim_ratio=recipe.ratio if recipe.head_dim_ratio is None else recipe.head_dim_ratio,
            block_ratio=recipe.ratio if recipe.remove_blocks == "auto" else 0.0,
        )

    @property
    def largest(self) -> float:
        """The largest of the four ratios."""
        return max(self.ratio, self.head_ratio, self.head_dim_ratio, self.block_ratio)

    def scaled(self, share: float) -> "Ratios":
        """Return ratios in the same proportions with `share` as the largest one."""
        values = (self.ratio, self.head_ratio, self.head_dim_ratio, self.block_ratio)
        return Ratios(*(value / max(values) * share for value in values))

    def deepest(self) -> "Ratios":
        """Return 1 for each non-zero ratio of channels, heads and dims: the smallest model that the floors allow."""
        return Ratios(float(self.ratio > 0), float(self.head_ratio > 0), float(self.head_dim_ratio > 0))


@dataclass(frozen=True)
class WidthSettings:
    """Bounds on the width of a single group.

    Args:
        min_keep: Smallest number of channels (or dims of a head).
        max_ratio: Largest fraction that may be removed from a group.
        round_to: Widths are multiples of this number.
    """

    min_keep: int
    max_ratio: float
    round_to: int

    def floor(self, size: int) -> int:
        """Return the smallest width of a group of `size` channels, or of `size` dims per head."""
        return min(size, max(self.min_keep, size - math.floor(size * self.max_ratio + _ROUNDING_ERROR)))

    def head_floor(self, num_heads: int) -> int:
        """Return the smallest number of heads of an attention."""
        return max(1, num_heads - math.floor(num_heads * self.max_ratio + _ROUNDING_ERROR))


@dataclass(frozen=True)
class PatternSettings:
    """Settings that name groups by pattern, and the scope of all other groups.

    Args:
        include: Patterns of the groups that may be cut; all if empty.
        exclude: Patterns of the groups that may not be cut.
        ratios: Pattern -> fixed fraction to remove.
        scopes: Pattern -> name of a custom scope.
        scope: Scope of the groups that `scopes` does not name.
    """

    include: Sequence[str]
    exclude: Sequence[str]
    ratios: Mapping[str, float]
    scopes: Mapping[str, str]
    scope: Literal["isomorphic", "global", "local"]


@dataclass(frozen=True)
class AllocationSettings:
    """Settings of an allocation problem; `PruneRecipe` documents each of them.

    Args:
        widths: Bounds on single groups.
        patterns: Which groups may be cut, and which compete.
        normalizer: Divisor of the scores of a group.
        selection: Exact counts, or all units below a threshold.
        rounding: How widths are rounded to allowed ones.
        head_dims: Whether heads share the removed dims.
        is_uniform: Groups at the same place of all blocks have equal widths.
        remove_blocks: Residual blocks to remove.
    """

    widths: WidthSettings
    patterns: PatternSettings
    normalizer: Normalizer
    selection: Literal["exact", "threshold"]
    rounding: Literal["balanced", "down"]
    head_dims: Literal["per_head", "shared", "shared_all"]
    is_uniform: bool
    remove_blocks: int | Literal["auto"] | list[str] | dict[str, int] | None

    @classmethod
    def from_recipe(cls, recipe: PruneRecipe) -> "AllocationSettings":
        """Return the settings of a recipe that an allocation depends on, ratios and budget excepted."""
        recipe = recipe.settled(has_images=False)  # the values are None only until then
        return cls(
            widths=WidthSettings(recipe.min_keep, cast("float", recipe.max_ratio), recipe.round_to),
            patterns=PatternSettings(recipe.include, recipe.exclude, recipe.ratios, recipe.scopes, recipe.scope),
            normalizer=cast("Normalizer", recipe.normalizer),
            selection=recipe.selection,
            rounding=recipe.rounding,
            head_dims=recipe.head_dims,
            is_uniform=recipe.layout == "uniform",
            remove_blocks=recipe.remove_blocks,
        )
