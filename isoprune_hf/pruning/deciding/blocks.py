"""Choose the residual blocks to remove: `choose_fixed_blocks` by name or count, `choose_blocks` by ratio."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.groups import ResidualBlock

Blocks = Mapping[str, ResidualBlock]
BlockScores = Mapping[str, float]


def choose_fixed_blocks(
    blocks: Blocks, scores: BlockScores, remove_blocks: int | Literal["auto"] | list[str] | dict[str, int] | None
) -> tuple[str, ...]:
    """Choose the blocks that a recipe removes whatever the ratios are, in the order of the model.

    Args:
        blocks: Name -> block.
        scores: Name -> score; the lowest-scored blocks are removed first, and those without a score are not removed.
        remove_blocks: Names, a number, or pattern -> number; `auto` and None fix no block.

    Raises:
        RecipeError: A named block is not removable, or fewer blocks than asked for are.
    """
    if isinstance(remove_blocks, list):
        unknown = [name for name in remove_blocks if name not in blocks]
        if unknown:
            raise RecipeError(
                f"prune.remove_blocks: {unknown[0]!r} is not a removable residual block; removable blocks: "
                f"{', '.join(blocks) or 'none'}"
            )
        return tuple(name for name in blocks if name in remove_blocks)
    if isinstance(remove_blocks, dict):
        return _lowest_blocks(blocks, scores, {f"remove_blocks[{p!r}]": (p, n) for p, n in remove_blocks.items()})
    if isinstance(remove_blocks, int):
        return _lowest_blocks(blocks, scores, {"remove_blocks": ("*", remove_blocks)})
    return ()


def choose_blocks(blocks: Blocks, scores: BlockScores, ratio: float) -> tuple[str, ...]:
    """Choose the round(ratio x blocks) lowest-scored blocks of each isomorphic class; each stage keeps one."""
    chosen: set[str] = set()
    for signature in {block.signature for block in blocks.values()} if ratio else ():
        names = [name for name in _removable_blocks(blocks, scores) if blocks[name].signature == signature]
        total = sum(block.signature == signature for block in blocks.values())
        chosen |= set(names[: round(ratio * total)])
    return tuple(name for name in blocks if name in chosen)


def _lowest_blocks(blocks: Blocks, scores: BlockScores, counts: Mapping[str, tuple[str, int]]) -> tuple[str, ...]:
    """Choose the lowest-scored blocks by setting -> (pattern, number)."""
    chosen: set[str] = set()
    for setting, (pattern, count) in counts.items():
        known = [name for name in blocks if fnmatchcase(name, pattern)]
        removable = [name for name in _removable_blocks(blocks, scores) if name in known and name not in chosen]
        if count > len(removable):
            raise RecipeError(
                f"prune.{setting}: cannot remove {count} blocks; {len(removable)} of the {len(known)} matching "
                "residual blocks are removable, since each stage keeps one, and blocks without a score stay"
            )
        chosen |= set(removable[:count])
    return tuple(name for name in blocks if name in chosen)


def _removable_blocks(blocks: Blocks, scores: BlockScores) -> list[str]:
    """Return the removable blocks, lowest score first: all but the best block of a stage that would become empty."""
    order = sorted(blocks, key=lambda name: scores.get(name, math.inf))
    best = {name.rpartition(".")[0]: name for name in order if not blocks[name].is_optional}
    return [name for name in order if name in scores and name not in best.values()]
