"""Tables of the rows that `coverage.py` records."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coverage_models import Case, not_applicable

WAYS = ("default", "plain")
# Kind of a failure in a record -> column: an IsoPruneError, a wrong result, any other error, a killed process.
KINDS = {"refused": "refused by name", "wrong": "wrong", "traceback": "traceback", "limit": "over a limit"}
LOW_SHARE = 0.9  # of the parameters
LISTED = 10

Row = dict[str, Any]


def read_rows(results: Path) -> dict[str, Row]:
    """Read results: name of the model -> row; a later row of a model replaces an earlier one."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["name"]: row for row in rows}


def measured(row: Row, way: str) -> bool:
    """Return whether a way was run, or its base could not be opened; rows of an earlier default have only `plain`."""
    return way in row or "error" in row["load"]


def passed(row: Row, way: str) -> bool:
    """Return whether all steps of a way passed."""
    return bool(row.get(way, {}).get("step") == "done")


def failure(row: Row, way: str) -> Row:
    """Return the record of a way that failed: that of opening the base if it failed there."""
    failed: Row = row["load"] if "error" in row["load"] else row[way]
    return failed


def passed_unrepaired(row: Row) -> bool:
    """Return whether the default passed with the weights as they were cut, because no repair brought them nearer."""
    return passed(row, "default") and "unrepaired" in row["default"]


def tables(cases: Sequence[Case], rows: Mapping[str, Row], population: str) -> str:
    """Return all tables as Markdown."""
    rows = {name: rows[name] for name in sorted(case.name for case in cases) if name in rows}
    ways = [way for way in WAYS if any(measured(row, way) for row in rows.values())]
    blocks = [count_table(cases, rows, way) for way in ways]
    blocks += [failure_table(rows, way) for way in ways]
    blocks += [worst_table(rows, "cpu_s", "CPU s"), worst_table(rows, "peak_mb", "memory in MB")]
    blocks += [share_table(rows), over_table(rows), unrepaired_table(rows)]
    blocks.append(reason_list(not_applicable(population)))
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def documented(page: str, population: str, text: str) -> str:
    """Return a page with the tables of a population, which stand between two comments, replaced by `text`."""
    start, end = f"<!-- coverage {population} -->\n", f"<!-- end of coverage {population} -->"
    before, _, rest = page.partition(start)
    return f"{before}{start}\n{text}\n\n{end}{rest.partition(end)[2]}"


def count_table(cases: Sequence[Case], rows: Mapping[str, Row], way: str) -> list[str]:
    """Count the results of one way by library or task; some models pass the default without a repair."""
    titles = [
        way,
        "models",
        "measured",
        "pass",
        *(["of these unrepaired"] if way == "default" else []),
        *KINDS.values(),
    ]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for kind in (*sorted({case.kind for case in cases}), "all"):
        names = [case.name for case in cases if kind in (case.kind, "all")]
        found = [rows[name] for name in names if name in rows and measured(rows[name], way)]
        kinds = [failure(row, way)["kind"] for row in found if not passed(row, way)]
        good = len(found) - len(kinds)
        share = f"{good} ({good / len(found):.1%})" if found else "-"
        unrepaired = [sum(map(passed_unrepaired, found))] if way == "default" else []
        cells = [len(names), len(found), share, *unrepaired, *(kinds.count(kind) for kind in KINDS)]
        lines.append(f"| {kind} | {' | '.join(map(str, cells))} |")
    return lines


def failure_table(rows: Mapping[str, Row], way: str) -> list[str]:
    """List the models that do not pass one way."""
    lines = []
    for name, row in sorted(rows.items()):
        if measured(row, way) and not passed(row, way):
            failed = failure(row, way)
            error = f"{failed['type']}: {failed['error']}".replace("|", "/")
            lines.append(f"| {name} | {failed['kind']} | {failed['step']} | {error[:160]} |")
    return _table(f"| {way} fails | kind | at | error |", "|---|---|---|---|", lines)


def worst_table(rows: Mapping[str, Row], figure: str, title: str) -> list[str]:
    """List the ten models with the largest figure in one of the ways."""

    def figures(row: Row) -> list[float]:
        return [row[way][figure] for way in WAYS if figure in row.get(way, {})]

    lines = []
    for name, row in sorted(rows.items(), key=lambda item: -max(figures(item[1]), default=0))[:LISTED]:
        cells = [str(row.get(way, {}).get(figure, "-")) for way in WAYS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return _table(f"| most {title} | {' | '.join(WAYS)} |", "|---|---:|---:|", lines)


def share_table(rows: Mapping[str, Row]) -> list[str]:
    """List the families with a model of which few parameters are in groups that can be pruned."""
    families: dict[str, list[float]] = {}
    for row in rows.values():
        share = next((row[way]["share"] for way in WAYS if "share" in row.get(way, {})), None)
        if share is not None:
            families.setdefault(f"{row['library']} {row['family']}", []).append(share)
    lines = [
        f"| {family} | {len(shares)} | {min(shares):.1%} | {sum(shares) / len(shares):.1%} |"
        for family, shares in sorted(families.items(), key=lambda item: min(item[1]))
        if min(shares) < LOW_SHARE
    ]
    return _table("| parameters in groups | models | least | mean |", "|---|---:|---:|---:|", lines)


def over_table(rows: Mapping[str, Row]) -> list[str]:
    """List the models of which half of the MACs cannot be removed, with the reason."""
    lines = []
    for name, row in sorted(rows.items()):
        reason = next((row[way]["over"] for way in WAYS if "over" in row.get(way, {})), None)
        if reason is not None:
            lines.append(f"| {name} | {reason} |")
    return _table("| half of the MACs cannot be removed | why |", "|---|---|", lines)


def unrepaired_table(rows: Mapping[str, Row]) -> list[str]:
    """List the models that pass by default without a repair, with the reason."""
    lines = [
        f"| {name} | {row['default']['unrepaired']} |" for name, row in sorted(rows.items()) if passed_unrepaired(row)
    ]
    return _table("| no repair is used | why |", "|---|---|", lines)


def reason_list(reasons: Mapping[str, str]) -> list[str]:
    """List the models that are not in the count, those of one reason in one line."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [
        f"{len(reasons)} are not in the count:",
        "",
        *(f"- {', '.join(some)}: {why}" for why, some in names.items()),
    ]


def _table(title: str, alignment: str, lines: list[str]) -> list[str]:
    return [title, alignment, *lines] if lines else []
