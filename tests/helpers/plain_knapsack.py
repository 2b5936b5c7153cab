"""One round of the allocation knapsack by its definition: every cut is computed, sorted and applied."""

import math
from dataclasses import replace

import numpy as np

from isoprune_hf.pruning.deciding.refill import movable_groups


def plain_round(start):
    """Return the allocation after the cheapest cuts that save a tenth of the distance to the budget together."""
    problem, limit, allocation, figure = start.problem, start.limit, start.allocation, start.figure
    goal, saved = 0.1 * (figure - limit.target), 0.0
    cuts = [
        cut
        for at, tied in enumerate(movable_groups(problem, allocation))
        for cut in all_cuts(problem, limit, allocation, figure, tied, at)
    ]
    for _, _, saving, change in sorted(cuts, key=lambda cut: cut[:2]):
        allocation = change(allocation)
        saved += saving
        if saved >= goal:
            break
    return allocation


def all_cuts(problem, limit, allocation, figure, tied, position):
    """Yield (loss per saving, position, saving, function that applies it): for all widths, for the weakest head."""
    group, ratios = tied.first, problem.ratios
    step = problem.settings.widths.round_to
    step //= math.gcd(step, 1 if group.num_heads else group.members[0].index.shape[1])
    width, rate = allocation.widths[group.name], 0.0
    lower = (width - 1) // step * step
    per_unit = 0.0
    if (ratios.head_dim_ratio if group.num_heads else ratios.ratio) and lower >= problem.floor(group):
        per_unit = (figure - limit.measure(problem, allocation.resized(tied, lower))) / (width - lower)
    while per_unit > 0 and lower >= problem.floor(group):
        loss = float(problem.sorted_units(tied, allocation.heads)[::-1][lower:width].sum())
        loss *= sum(len(allocation.heads.get(member.name, (0,))) for member in tied.groups)
        rate = max(rate, loss / (per_unit * (width - lower)))
        yield rate, position, per_unit * (width - lower), lambda left, to=lower: left.resized(tied, to)
        width, lower = lower, lower - step
    if not (ratios.head_ratio and len(allocation.heads.get(group.name, ())) > problem.head_floor(group)):
        return
    heads, total = dict(allocation.heads), 0.0
    for member in tied.groups:
        scores = np.sort(problem.scores[member.name].reshape(member.num_heads, -1), axis=1)
        losses = scores[:, -allocation.widths[member.name] :].sum(axis=1)
        weakest = min(heads[member.name], key=lambda head: losses[head])
        heads[member.name] = tuple(head for head in heads[member.name] if head != weakest)
        total += float(losses[weakest])
    saving = figure - limit.measure(problem, replace(allocation, heads=heads))
    changed = {member.name: heads[member.name] for member in tied.groups}
    if saving > 0:
        yield total / saving, position, saving, lambda left: replace(left, heads={**left.heads, **changed})
