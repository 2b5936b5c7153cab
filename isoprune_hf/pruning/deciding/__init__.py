"""Decide which channels, heads and blocks to remove: scores and a budget in, a `PruningPlan` out.

Entry points: `make_plan.make_plan`, `budget.check_budget` (refuse an unreachable budget before scoring),
`alternatives.make_alternatives` (plans to compare), `iterative.recipe_of_step` and `iterative.lift_scores`
(pruning in several steps).

How it works: `allocation_problem` holds the scores, the tied groups and the allowed widths; `choose` finds the
allocation at given ratios; `by_class` and `knapsack`, registered in `allocators`, meet a budget.

Nothing here reads weights or images, or knows how a model is cut.
"""
