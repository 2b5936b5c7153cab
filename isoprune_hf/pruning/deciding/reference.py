"""What torch-pruning 1.6.1 and the paper's scripts count and select, where we do otherwise; for parity alone.

`prune.preset: reference` puts these choices together; `docs/reference_parity.md` compares them with ours.
"""

from collections.abc import Mapping

import numpy as np


def threshold_counts(
    units: Mapping[str, np.ndarray], floors: Mapping[str, int], ratio: float
) -> tuple[dict[str, int], dict[str, float] | None]:
    """Let every unit of a pool leave whose score is at most that of rank n - int(n (1 - ratio)), n units in all.

    So equal scores leave together, and the fraction is cut off as float arithmetic has it: of 10 units 0.9 removes
    10. Groups that may lose nothing are not in the pool.

    Args:
        units: Group -> ascending scores of its units.
        floors: Group -> units that must stay; only read to see which groups may lose nothing.
        ratio: Fraction that leaves.

    Returns:
        Group -> number of units above the threshold, 0 where the whole group is below it; and the margin: the
        threshold and the lowest score above it, None where nothing leaves or nothing is above.

    Source:
        torch_pruning 1.6.1, `BasePruner._prune` with global_pruning.
    """
    counts = {name: len(values) for name, values in units.items()}
    pool = [name for name, count in counts.items() if floors[name] < count]
    values = np.sort(np.concatenate([units[name] for name in pool])) if pool else np.empty(0)
    leaving = len(values) - int(len(values) * (1 - ratio))
    if leaving <= 0:
        return counts, None
    threshold = values[leaving - 1]
    counts |= {name: int((units[name] > threshold).sum()) for name in pool}
    above = values[values > threshold]
    return counts, {"removed": float(threshold), "kept": float(above[0])} if len(above) else None
