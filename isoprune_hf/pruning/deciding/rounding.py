"""How many units of a pool stay: the lowest-scored leave, floors hold, widths are rounded without losing the sum."""

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
    """Let the lowest-scored units of a pool leave.

    Args:
        units: Group -> ascending scores of its units.
        floors: Group -> units that must stay; its best ones are out of the competition.
        ratio: Fraction that leaves: round(ratio x channels), ties by (group order, index), as far as the floors allow.
        weights: Group -> channels that one of its units stands for; all equal when not given. Where they differ, the
            nearest sum to round(ratio x channels) leaves.

    Returns:
        Group -> number of units that stay; and the margin: the highest score that left and the lowest that stayed,
        None where nothing left.
    """
    names = list(units)
    free = [units[name][: len(units[name]) - floors[name]] for name in names]
    owners = np.repeat(np.arange(len(names)), [len(values) for values in free])
    values = np.concatenate(free)
    sizes = np.array([1 if weights is None else weights[name] for name in names])
    order = np.argsort(values, kind="stable")
    target = round(ratio * int(sum(len(units[name]) * size for name, size in zip(names, sizes, strict=True))))
    sums = np.concatenate([[0], np.cumsum(sizes[owners[order]])])
    leaving = order[: int(np.abs(sums - target).argmin())]
    counts = np.bincount(owners[leaving], minlength=len(names))
    kept = {name: len(units[name]) - int(counts[position]) for position, name in enumerate(names)}
    if not len(leaving):
        return kept, None
    lowest = min(units[name][len(units[name]) - count] for name, count in kept.items())
    return kept, {"removed": float(values[leaving].max()), "kept": float(lowest)}


def round_counts(
    counts: Mapping[str, int],
    allowed: Mapping[str, Sequence[int]],
    units: Mapping[str, np.ndarray],
    weights: Mapping[str, int],
) -> dict[str, int]:
    """Move every count to an allowed width so that the pool keeps its sum of channels as nearly as the widths permit.

    Args:
        counts: Group -> units that stay.
        allowed: Group -> ascending widths to choose from.
        units: Group -> ascending scores of its units.
        weights: Group -> channels that one of its units stands for.

    Returns:
        Group -> an allowed width: the next lower one, or the next higher one for the groups that lost most by rounding
        down. Where floors and narrow layers keep more than the pool may, the others give up their lowest-scored units.
    """
    widths, rise = round_down(counts, allowed), []
    for position, (name, count) in enumerate(counts.items()):
        lower = widths[name]
        upper = next((width for width in allowed[name] if width > lower), None)
        if upper is not None and count > lower:
            rise.append(((lower - count) / (upper - lower), position, name, upper))
    missing = sum((count - widths[name]) * weights[name] for name, count in counts.items())
    for _, _, name, upper in sorted(rise):
        gain = (upper - widths[name]) * weights[name]
        if 2 * missing >= gain:
            missing -= gain
            widths[name] = upper
    while missing < 0:
        falls = []
        for position, (name, width) in enumerate(widths.items()):
            lower = max((size for size in allowed[name] if size < width), default=width)
            loss = (width - lower) * weights[name]
            if 0 < loss <= -2 * missing:
                falls.append(
                    (units[name][len(units[name]) - width : len(units[name]) - lower].mean(), position, name, lower)
                )
        if not falls:
            break
        _, _, name, lower = min(falls)
        missing += (widths[name] - lower) * weights[name]
        widths[name] = lower
    return widths


def round_down(counts: Mapping[str, int], allowed: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Move every count to the next lower allowed width; to the lowest where there is none."""
    return {
        name: max((width for width in allowed[name] if width <= count), default=allowed[name][0])
        for name, count in counts.items()
    }


def width_step(group: CoupledGroup, round_to: int) -> int:
    """Channels of a group between two aligned widths: in grouped layers a channel stands for one of every group."""
    ways = 1 if group.num_heads else group.members[0].index.shape[1]
    return round_to // math.gcd(round_to, ways)


def best_units(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` highest scores; of equal ones, those with the lower index leave first."""
    return np.argsort(scores, kind="stable")[len(scores) - count :].tolist()
