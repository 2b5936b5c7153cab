"""The values of an allocation: groups tied to one width, and the widths, heads and blocks that were chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from isoprune_hf.pruning.groups import CoupledGroup


@dataclass(frozen=True, eq=False)
class TiedGroups:
    """Groups whose widths must be equal; most often a single group.

    In a uniform layout the groups at the same place of all blocks are tied.
    """

    groups: tuple[CoupledGroup, ...]

    @property
    def first(self) -> CoupledGroup:
        """The first group, which represents the others: all have the same size."""
        return self.groups[0]

    @property
    def name(self) -> str:
        """Name of the first group."""
        return self.groups[0].name


@dataclass(frozen=True)
class Allocation:
    """The widths, heads and blocks that an allocator keeps.

    Args:
        widths: Group -> channels to keep; dims to keep in each head for attention. Groups inside removed blocks are
            missing.
        heads: Attention group -> heads to keep, ascending.
        removed_blocks: Residual blocks to remove.
        margins: First group of a pool -> highest removed and lowest kept score, before rounding.
        spared: Groups that a threshold would have emptied, and that keep their floor.
    """

    widths: Mapping[str, int]
    heads: Mapping[str, tuple[int, ...]]
    removed_blocks: tuple[str, ...] = ()
    margins: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    spared: tuple[str, ...] = ()

    def resized(self, tied: TiedGroups, width: int) -> "Allocation":
        """Return a copy in which all tied groups have another width."""
        return replace(self, widths={**self.widths, **dict.fromkeys((group.name for group in tied.groups), width)})
