"""The cost of widths: MACs, parameters and milliseconds, as functions of what a cut removes.

Entry points: `macs.count_cost` counts a model, `macs.cost_model` writes its cost as a function of widths, and
`latency.fit_latency` fits a time to each of its layers, which `latency_cache.remembered` keeps for the next run.
`macs.RemovedUnits` is what they are evaluated at.

Nothing here knows scores, budgets or recipes.
"""
