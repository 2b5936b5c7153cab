"""Selection by threshold, as torch-pruning 1.6.1 and the scripts of the paper select; for parity only.

`prune.preset: reference` uses it; `docs/reference_parity.md` compares it with exact counts.
"""

from collections.abc import Mapping

import numpy as np


def threshold_counts(
    units: Mapping[str, np.ndarray], floors: Mapping[str, int], ratio: float
) -> tuple[dict[str, int], dict[str, float] | None]:
    """Count the units of a pool above the score of rank n - int(n (1 - ratio)), n being the number of units.

    Equal scores are removed together, and the fraction is truncated as float arithmetic has it: of 10 units 0.9
    removes 10. Groups whose floor is their size are not in the pool.

    Args:
        units: Group -> ascending scores of its units.
        floors: Group -> smallest number of units; only used to find the groups that may lose none.
        ratio: Fraction to remove.

    Returns:
        Group -> number of units above the threshold, 0 if the whole group is below it; and the margin: the threshold
        and the lowest score above it, None if nothing is removed or nothing is above.

    Source:
        torch_pruning 1.6.1, `BasePruner._prune` with global_pruning.
    """
    counts = {name: len(values) for name, values in units.items()}
    pool = [name for name, count in counts.items() if floors[name] < count]
    scores = np.sort(np.concatenate([units[name] for name in pool])) if pool else np.empty(0)
    removed = len(scores) - int(len(scores) * (1 - ratio))
    if removed <= 0:
        return counts, None
    threshold = scores[removed - 1]
    counts |= {name: int((units[name] > threshold).sum()) for name in pool}
    above = scores[scores > threshold]
    return counts, {"removed": float(threshold), "kept": float(above[0])} if len(above) else None
