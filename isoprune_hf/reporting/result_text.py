"""Show the result of a pruning as one short table: `describe_result`."""

import re
from collections.abc import Sequence

from isoprune_hf.pruning.cost.macs import ModelCost
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.tables import align_columns, shorten

_UNITS = ((1e9, " G"), (1e6, " M"), (1e3, " k"))
_MAX_ROWS = 20  # of widths
_MAX_NOTES = 5
_LINE = 119


def describe_result(
    title: str,
    base: ModelCost,
    pruned: ModelCost,
    groups: Sequence[CoupledGroup],
    plan: PruningPlan,
) -> str:
    """Return costs and widths before and after a cut as a table, and the notes of the plan below it.

    Groups whose names differ only in numbers share a row, with the smallest and the largest width that they keep.

    Args:
        title: First cell of the table.
        base: Cost of the base.
        pruned: Cost of the pruned model.
        groups: Coupled groups of the base.
        plan: The plan.
    """
    rows = [[title, "base", "pruned", "kept"]]
    for name, before, after in (("MACs", base.macs, pruned.macs), ("params", base.params, pruned.params)):
        rows.append([name, _count(before), _count(after), _share(after, before)])
    widths = _width_rows(groups, plan)
    lines = [align_columns([*rows, *widths[:_MAX_ROWS]])]
    if len(widths) > _MAX_ROWS:
        lines.append(f"... and {len(widths) - _MAX_ROWS} more rows of widths")
    if plan.removed_blocks:
        lines.append(shorten(f"removed blocks: {', '.join(plan.removed_blocks)}", _LINE))
    lines += [shorten(f"note: {note}", _LINE) for note in plan.notes[:_MAX_NOTES]]
    if len(plan.notes) > _MAX_NOTES:
        lines.append(f"... and {len(plan.notes) - _MAX_NOTES} more notes in plan.notes")
    return "\n".join(lines)


def _width_rows(groups: Sequence[CoupledGroup], plan: PruningPlan) -> list[list[str]]:
    """Return a row for each set of groups whose names differ only in numbers, in the order of the network."""
    sets: dict[tuple[str, int], list[int]] = {}
    gone = tuple(f"{block}." for block in plan.removed_blocks)
    for group in groups:
        if gone and f"{group.name}.".startswith(gone):
            continue
        kept = len(plan.kept.get(group.name, range(group.channels)))
        sets.setdefault((re.sub(r"\d+", "*", group.name), group.channels), []).append(kept)
    first = {(re.sub(r"\d+", "*", group.name), group.channels): group.name for group in reversed(groups)}
    rows = []
    for (pattern, channels), widths in sets.items():
        name = first[pattern, channels] if len(widths) == 1 else f"{pattern} ({len(widths)})"
        low, high = min(widths), max(widths)
        width = str(low) if low == high else f"{low} to {high}"
        rows.append([shorten(name, 60), str(channels), width, _share(sum(widths), channels * len(widths))])
    return rows


def _count(number: int) -> str:
    """Return a number with four digits and the letter of its unit."""
    size, unit = next(((size, unit) for size, unit in _UNITS if number >= size), (1, ""))
    return f"{number / size:.4g}{unit}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
