"""Compare the speed of a base and a pruned model, and show the result as a table and as text.

`benchmark_models` measures, `benchmark_table` and `benchmark_text` show. The measured speed-up is compared with that
of the MACs, and `speed_reasons` explains the difference.
"""

import math
from collections.abc import Mapping
from typing import Any

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.measuring.cases import BenchmarkSettings, describe_machine, measure_cases
from isoprune_hf.measuring.module_times import share_of_modules
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.reporting.speed_picture import RUNTIMES, runtime_label
from isoprune_hf.reporting.speed_reasons import describe_layers, explain_speed_gap
from isoprune_hf.reporting.tables import align_columns

_HEADINGS = [
    "runtime",
    "dtype",
    "batch",
    "base ms",
    "pruned ms",
    "faster",
    "vs fastest base",
    "of MACs",
    "base MB",
    "pruned MB",
]
_MIN_MILLISECONDS = 1e-3  # shorter times are shown with the digits of this one


def benchmark_models(
    base: IsoPruneForImageClassification, pruned: IsoPruneForImageClassification, settings: BenchmarkSettings
) -> dict[str, Any]:
    """Measure a base and a pruned model in turns, in every runtime, dtype and batch size.

    Args:
        base: The dense base.
        pruned: The pruned model, on the same device; neither model is changed.
        settings: The cases to measure.

    Returns:
        Plain values for JSON: the machine, the MACs, a row for each case, the cases that could not be measured, and a
        sentence that explains why the measured speed-up differs from that of the MACs.
    """
    models = {"base": base, "pruned": pruned}
    costs = {name: count_cost(model).macs for name, model in models.items()}
    promised = costs["base"] / costs["pruned"]
    measured = measure_cases(models, settings, promised=promised)
    record: dict[str, Any] = {
        "machine": describe_machine(base.device),
        "macs": costs,
        "promised": promised,
        "rows": measured.rows,
        "left_out": [str(case) for case in measured.left_out],
        "notes": [str(note) for note in measured.notes],
        "settings": {"repeats": settings.repeats, "seconds": settings.seconds},
        "layers": describe_layers(pruned),
        "modules": share_of_modules(pruned, image_size_of(pruned), batch_size=min(settings.batch_sizes)),
    }
    _compare_with_fastest(record)
    quiet = without_busy_rows(record)
    record["reason"] = explain_speed_gap(quiet) if quiet["rows"] else None
    return record


def _compare_with_fastest(record: dict[str, Any]) -> None:
    """Add to each row the speed-up against the fastest base of its batch size, which may run elsewhere."""
    fastest: dict[int, Mapping[str, Any]] = {}
    for row in without_busy_rows(record)["rows"]:
        known = fastest.setdefault(row["batch_size"], row)
        if row["base"]["median"] < known["base"]["median"]:
            fastest[row["batch_size"]] = row
    for row in record["rows"]:
        if row["batch_size"] in fastest:
            row["of_fastest"] = fastest[row["batch_size"]]["base"]["median"] / row["pruned"]["median"]
    record["fastest_base"] = {
        str(size): {key: row[key] for key in ("runtime", "dtype")} for size, row in fastest.items()
    }


def without_busy_rows(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a benchmark with the rows that may be published; the others are listed among those not measured."""
    busy = [
        f"{runtime_label(row)} in {row['dtype']}, batch {row['batch_size']}: machine busy ({row['busy']})"
        for row in record["rows"]
        if "busy" in row
    ]
    rows = [row for row in record["rows"] if "busy" not in row]
    return {**record, "rows": rows, "left_out": [*record["left_out"], *busy]}


def benchmark_table(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of a benchmark as text cells, headings first; columns without any figure are omitted."""
    body = []
    for row in record["rows"]:
        memory = row.get("memory") or {}
        body.append(
            [
                runtime_label(row),
                row["dtype"],
                str(row["batch_size"]),
                *(format_quartiles(row[name]) for name in ("base", "pruned")),
                f"{row['faster']:.2f}x" + (" (busy)" if "busy" in row else ""),
                f"{row['of_fastest']:.2f}x" if "of_fastest" in row else "",
                f"{row['of_promised']:.2f}",
                *(f"{memory[name] / 1e6:.1f}" if name in memory else "" for name in ("base", "pruned")),
            ]
        )
    table = [_HEADINGS, *body]
    shown = [index for index in range(len(_HEADINGS)) if any(row[index] for row in body)]
    return [[row[index] or "-" for index in shown] for row in table]


def benchmark_text(record: Mapping[str, Any]) -> str:
    """Return a benchmark as text for a terminal."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}; {versions}",
        f"MACs promise {record['promised']:.2f}x; a time is a median with its quartiles",
        "",
        align_columns(benchmark_table(record)),
        *(
            f"fastest base, batch {size}: {RUNTIMES[case['runtime']]} in {case['dtype']}"
            for size, case in (record.get("fastest_base") or {}).items()
        ),
        *(f"not measured: {entry}" for entry in record["left_out"]),
        *(record.get("notes") or ()),
    ]
    if any("busy" in row for row in record["rows"]):
        lines.append("busy: other programs used the machine; these rows are not stored, measure them again")
    if record["reason"]:
        lines += ["", record["reason"]]
    return "\n".join(lines)


def format_quartiles(times: Mapping[str, float]) -> str:
    """Return a median with its quartiles, with three significant digits of the median."""
    decimals = max(0, 2 - math.floor(math.log10(max(times["median"], _MIN_MILLISECONDS))))
    low, median, high = (f"{times[key]:.{decimals}f}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"
