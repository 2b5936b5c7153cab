"""Sizes that the code of a network compares with literals: `freeze_compared`."""

from isoprune_hf.pruning.graph.axis import Axis, freeze
from isoprune_hf.pruning.graph.equations import Solution
from isoprune_hf.pruning.graph.polynomial import size_polynomial
from isoprune_hf.pruning.graph.trace import Trace
from isoprune_hf.pruning.graph.traced_int import atoms


def freeze_compared(trace: Trace, solution: Solution) -> bool:
    """Freeze, in place, sizes that the code compares with a literal of at least 2; returns whether there was one.

    A smaller size could change the outcome of the comparison, and with it the operations that run.
    """
    has_frozen = False
    for comparison in trace.comparisons:
        if comparison.symbol in ("==", "!="):
            continue
        if isinstance(comparison.left, int) == isinstance(comparison.right, int):
            continue
        literal, other = comparison.left, comparison.right
        if isinstance(other, int):
            literal, other = other, literal
        if not isinstance(literal, int) or literal < 2:
            continue
        for atom in atoms(other):
            if isinstance(atom, Axis):
                polynomial = size_polynomial(atom, solution.by_id)
            else:
                polynomial = solution.attributes.get(atom, {})
            for leaf in (leaf for monomial in polynomial for leaf in monomial):
                if solution.by_id[leaf].frozen is None:
                    freeze(solution.by_id[leaf], f"the code compares it with {literal}")
                    has_frozen = True
    return has_frozen
