"""Show a plan as text (`show_plan`), the differences of two (`diff_plans`), and forecasts (`show_forecast`)."""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isoprune_hf.pruning.forecast import Forecast
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.tables import align_columns, format_figure
from isoprune_hf.terminal import format_seconds

_COLUMNS = {"macs": "GMACs", "params": "M params", "latency_ms": "latency ms"}
_WIDTH = 100


def show_plan(plan: PruningPlan, *, title: str, sizes: Mapping[str, tuple[int, int]] | None = None) -> str:
    """Return a plan as text: settings, costs, kept channels and heads, removed blocks, margins and notes.

    Args:
        plan: The plan.
        title: Name of the plan in the first line.
        sizes: Group -> (channels, heads) of the base; without them only kept numbers are shown.
    """
    weights = plan.fingerprint[:12] or "without a fingerprint"
    parts = [f"plan of {title}, version {plan.version}, made on weights {weights}"]
    if plan.settings:
        parts.append(_paragraph("settings: ", [f"{key} {_shown(value)}" for key, value in _flat(plan.settings)]))
    if plan.achieved:
        parts.append(_costs(plan.achieved))
    parts.append(_groups(plan, sizes or {}))
    if plan.removed_blocks:
        parts.append(_paragraph("removed blocks: ", sorted(plan.removed_blocks, key=_natural)))
    if plan.margins:
        rows = [["margins", "best removed", "worst kept"]]
        for name, margin in plan.margins.items():
            rows.append([_shorten(name), *(_score(margin.get(key)) for key in ("removed", "kept"))])
        parts.append(align_columns(rows))
    if plan.notes:
        parts.append("\n".join(["notes", *(f"  {note}" for note in plan.notes)]))
    return "\n\n".join(parts)


def show_forecast(cost: Forecast) -> str:
    """Return a forecast as text: passes and time of each stage, and memory."""
    rows = [["stage", "passes", "products of fits", "at least"]]
    stages = {stage: passes for stage, passes in cost.passes.items() if passes}
    for stage, passes in stages.items():
        products = f"{cost.products:.1f}" if stage == "repair" and cost.products else "-"
        rows.append([stage, f"{passes:.1f}", products, format_seconds(cost.seconds(stage))])
    rows.append(["all", f"{sum(stages.values()):.1f}", "", format_seconds(_all_seconds(cost))])
    duration = format_seconds(cost.pass_seconds)
    return (
        f"{align_columns(rows)}\n\n"
        f"A pass is a forward pass of the base over {cost.images:,} images: {duration} at the "
        f"measured speed.\nThe solutions of the fits, and passes over single images, come on top.\n"
        f"Memory: {_memory(cost)}."
    )


def describe_forecast(cost: Forecast) -> str:
    """Return a forecast as one line: passes and time of each stage, all of the time, and memory."""
    stages = [
        f"{stage} {passes:.2g} pass{'' if passes == 1 else 'es'} ({format_seconds(cost.seconds(stage))})"
        for stage, passes in cost.passes.items()
        if passes
    ]
    return (
        f"estimate for {cost.images:,} images: {', '.join(stages)}, at least {format_seconds(_all_seconds(cost))} in "
        f"all; memory: {_memory(cost)}"
    )


def _all_seconds(cost: Forecast) -> float:
    return sum(cost.seconds(stage) for stage, passes in cost.passes.items() if passes)


def _memory(cost: Forecast) -> str:
    sizes = {
        "weights": cost.weight_bytes,
        "a scored micro-batch": cost.score_bytes,
        "outputs stored by the repair, in memory or temporary files": cost.stored_bytes,
    }
    shown = {name: f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB" for name, size in sizes.items()}
    return ", ".join(f"{name} {shown[name]}" for name, size in sizes.items() if size)


def diff_plans(first: PruningPlan, second: PruningPlan, names: tuple[str, str]) -> str:
    """Return the differences of two plans as text, or an empty text if the plans are equal.

    Args:
        first: Plan A.
        second: Plan B.
        names: Names of both plans.
    """
    left, right = (json.loads(plan.to_json()) for plan in (first, second))
    if left == right:
        return ""
    parts = [f"A: {names[0]}\nB: {names[1]}"]
    entries = []
    for key in ("version", "fingerprint", "settings", "achieved"):
        old, new = (dict(_flat({key: values.pop(key, {})})) for values in (left, right))
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                entries.append([name, *(_shown(values.get(name, "-")) for values in (old, new))])
    if entries:
        parts.append(align_columns([["", "A", "B"], *entries]))
    channels = _differing(left.pop("kept"), right.pop("kept"))
    if channels:
        rows = [["kept channels", "A", "B", "in both", "Jaccard"]]
        rows += [[name, *_overlap(*kept)] for name, kept in channels.items()]
        equal = len({*first.kept, *second.kept}) - len(channels)
        parts.append(f"{align_columns(rows)}\ngroups: {len(channels)} differ, {equal} equal")
    heads = _differing(left.pop("heads"), right.pop("heads"))
    if heads:
        rows = [["kept heads", "A", "B"]]
        for name, kept in heads.items():
            rows.append([name, *("all" if numbers is None else " ".join(map(str, numbers)) for numbers in kept)])
        parts.append(align_columns(rows))
    blocks = [set(values.pop("removed_blocks")) for values in (left, right)]
    for name, only in zip("AB", (blocks[0] - blocks[1], blocks[1] - blocks[0]), strict=True):
        if only:
            parts.append(_paragraph(f"blocks removed in {name} only: ", sorted(only, key=_natural)))
    others = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
    if others:
        parts.append(f"also different: {', '.join(others)}")
    return "\n\n".join(parts)


def _costs(achieved: Mapping[str, Mapping[str, float]]) -> str:
    base, pruned = achieved.get("base", {}), achieved.get("pruned", {})
    keys = [key for key in _COLUMNS if key in base or key in pruned]
    rows = [["cost", *(_COLUMNS[key] for key in keys)]]
    for name, costs in (("base", base), ("pruned", pruned)):
        rows.append([name, *(format_figure(key, costs.get(key)) for key in keys)])
    shares = [f"{pruned[key] / base[key]:.1%}" if base.get(key) and pruned.get(key) else "-" for key in keys]
    return align_columns([*rows, ["share kept", *shares]])


def _groups(plan: PruningPlan, sizes: Mapping[str, tuple[int, int]]) -> str:
    if not plan.kept:
        return "no group is cut"
    rows = [["groups that are cut", "channels", "stay", "heads", "dims of a head"]]
    order = {name: position for position, name in enumerate(sizes)}  # order of the network, if the sizes are given
    for name in sorted(plan.kept, key=lambda name: (order.get(name, len(order)), _natural(name))):
        channels, all_heads = sizes.get(name, (0, 0))
        kept, heads = len(plan.kept[name]), len(plan.heads.get(name, ()))
        share = f"{kept / channels:.0%}" if channels else ""
        dims = _of(kept // heads, channels // all_heads if all_heads else 0) if heads else ""
        rows.append([name, _of(kept, channels), share, _of(heads, all_heads) if heads else "", dims])
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    text = align_columns(list(zip(*columns, strict=True)))
    whole = [name for name in sizes if name not in plan.kept]
    return text + (f"\ngroups that are not cut: {len(whole)}" if whole else "")


def _of(kept: int, size: int) -> str:
    return f"{kept} of {size}" if size else str(kept)


def _overlap(first: Sequence[int] | None, second: Sequence[int] | None) -> list[str]:
    if first is None or second is None:  # a group that a plan does not name keeps all channels
        known = len(first or second or ())
        return [*("all" if kept is None else str(known) for kept in (first, second)), str(known), ""]
    both, either = len({*first} & {*second}), len({*first} | {*second})
    return [str(len(first)), str(len(second)), str(both), f"{both / either:.2f}"]


def _differing(
    first: Mapping[str, Sequence[int]], second: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Sequence[int] | None, Sequence[int] | None]]:
    names = sorted({*first, *second}, key=_natural)
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield settings with dotted names; unset ones are omitted."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif value not in (None, [], ""):
            yield name, value


def _shown(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value):
        return value[:12]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _paragraph(heading: str, entries: Iterable[str]) -> str:
    """Return a wrapped, comma-separated list of entries."""
    text = heading + ", ".join(entries)
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _shorten(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
