"""Count the units of a pool to keep (`keep_counts`) and round the counts to allowed widths (`round_counts`)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from isoprune_hf.pruning.groups import CoupledGroup


def keep_counts(
    units: Mapping[str, np.ndarray],
    floors: Mapping[str, int],
    ratio: float,
    weights: Mapping[str, int] | None = None,
) -> tuple[dict[str, int], dict[str, float] | None]:
    """Count the units to keep in each group when the lowest-scored units of a pool are removed.

    Args:
        units: Group -> ascending scores of its units.
        floors: Group -> smallest number of units; that many of its best units do not compete.
        ratio: Fraction to remove: round(ratio x channels) as far as the floors allow, equal scores in the order of
            groups and indices.
        weights: Group -> channels per unit; all equal by default. If they differ, the sum nearest to
            round(ratio x channels) is removed.

    Returns:
        Group -> number of units to keep; and the margin: the highest removed and the lowest kept score, None if
        nothing is removed.
    """
    names = list(units)
    free = [units[name][: len(units[name]) - floors[name]] for name in names]
    owners = np.repeat(np.arange(len(names)), [len(values) for values in free])
    values = np.concatenate(free)
    sizes = np.array([1 if weights is None else weights[name] for name in names])
    order = np.argsort(values, kind="stable")
    target = round(ratio * int(sum(len(units[name]) * size for name, size in zip(names, sizes, strict=True))))
    sums = np.concatenate([[0], np.cumsum(sizes[owners[order]])])
    removed = order[: int(np.abs(sums - target).argmin())]
    counts = np.bincount(owners[removed], minlength=len(names))
    kept = {name: len(units[name]) - int(counts[position]) for position, name in enumerate(names)}
    if not len(removed):
        return kept, None
    lowest = min(units[name][len(units[name]) - count] for name, count in kept.items())
    return kept, {"removed": float(values[removed].max()), "kept": float(lowest)}


def round_counts(
    counts: Mapping[str, int],
    allowed: Mapping[str, Sequence[int]],
    units: Mapping[str, np.ndarray],
    weights: Mapping[str, int],
) -> dict[str, int]:
    """Move every count to an allowed width and keep the sum of the pool as nearly as the widths permit.

    Args:
        counts: Group -> units to keep.
        allowed: Group -> allowed widths, ascending.
        units: Group -> ascending scores of its units.
        weights: Group -> channels per unit.

    Returns:
        Group -> an allowed width: the next lower one, or the next higher one for the groups that lost most by rounding
        down. If floors and narrow layers keep more than the pool may, the other groups lose their lowest-scored units.
    """
    widths = round_down(counts, allowed)
    rises: list[tuple[float, int, str, int]] = []
    for position, (name, count) in enumerate(counts.items()):
        lower = widths[name]
        upper = next((width for width in allowed[name] if width > lower), None)
        if upper is not None and count > lower:
            rises.append(((lower - count) / (upper - lower), position, name, upper))
    missing = sum((count - widths[name]) * weights[name] for name, count in counts.items())
    for _, _, name, upper in sorted(rises):
        gain = (upper - widths[name]) * weights[name]
        if 2 * missing >= gain:
            missing -= gain
            widths[name] = upper
    while missing < 0:
        falls: list[tuple[float, int, str, int]] = []
        for position, (name, width) in enumerate(widths.items()):
            lower = max((size for size in allowed[name] if size < width), default=width)
            loss = (width - lower) * weights[name]
            if 0 < loss <= -2 * missing:
                lost = units[name][len(units[name]) - width : len(units[name]) - lower]
                falls.append((float(lost.mean()), position, name, lower))
        if not falls:
            break
        _, _, name, lower = min(falls)
        missing += (widths[name] - lower) * weights[name]
        widths[name] = lower
    return widths


def round_down(counts: Mapping[str, int], allowed: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Move every count to the next lower allowed width, or to the lowest."""
    return {
        name: max((width for width in allowed[name] if width <= count), default=allowed[name][0])
        for name, count in counts.items()
    }


def width_step(group: CoupledGroup, round_to: int) -> int:
    """Return the channels between two aligned widths: in a grouped layer a unit is one channel of every group."""
    ways = 1 if group.num_heads else group.members[0].index.shape[1]
    return round_to // math.gcd(round_to, ways)


def best_units(scores: np.ndarray, count: int) -> list[int]:
    """Return the indices of the `count` highest scores; of equal scores, those with the higher index."""
    best: list[int] = np.argsort(scores, kind="stable")[len(scores) - count :].tolist()
    return best
