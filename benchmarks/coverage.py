"""Prune every kind of image classifier in a separate process, and print Markdown tables of the results.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/coverage.py [--results FILE] [--only NAME ...] [--list]

Every model is opened through `load_base` with random weights that keep all units active, saved and reloaded, traced,
pruned to half of its channels (isomorphic, widths in multiples of 8, by the sum of |w|), saved, reloaded with
bit-equal logits, trained for one step, and checked by the two float64 oracles of `tests/helpers/oracles.py`. The steps
are in `coverage_case.py`, the models in `coverage_models.py`.

A row of the results (JSON lines) is written when a model is done; models with a row are skipped, and `--again` repeats
the failed ones. Names: `t:FAMILY` for a model file of timm, `hf:TYPE` for a type of transformers.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coverage_case import run_case
from coverage_models import NOT_APPLICABLE, population

MEMORY_LIMIT = 16 * 2**30  # bytes of one process
# Number of these models that torch-pruning 1.6.1 prunes, and the root causes of its failures.
ANCHOR = {"timm": 45, "transformers": 22}
CAUSES = {
    "T": "the search does not end",
    "A": "numbers that modules keep",
    "Q": "queries, keys and values in other forms",
    "C": "concatenation",
    "S": "parts of a channel axis",
    "H": "the head axis mistaken for channels",
    "R": "expand and reshape of tokens",
    "O": "layers of an unknown type",
    "D": "outside the graph of the output",
    "G": "depthwise with a multiplier",
    "-": "none: the anchor prunes it",
}
_MEMBERS = {
    "T": "t:byoanet t:deepseek_vit t:efficientformer_v2 t:efficientvim t:efficientvit_msra t:focalnet t:hieradet_sam2 "
    "t:iformer t:maxxvit t:mobilenetv5 t:nest t:rexnet t:visformer hf:focalnet hf:mobilevitv2 hf:shieldgemma2",
    "A": "t:cpubone t:crossvit t:davit t:lowformer t:pvt_v2 t:tresnet t:volo hf:pvt hf:pvt_v2 hf:segformer",
    "Q": "t:cait t:edgenext t:efficientformer t:levit t:nextvit t:qwen3_vit t:tiny_vit t:xcit hf:levit",
    "C": "t:coat t:cspnet t:gemma4_vit t:tnt hf:cvt hf:dinov2 hf:dinov2_with_registers hf:donut-swin hf:imagegpt",
    "S": "t:dpn t:efficientvit_mit t:eva t:fasternet t:mambaout t:mlp_mixer t:res2net t:sknet",
    "H": "t:convit t:swin_transformer_v2 t:swin_transformer_v2_cr t:vision_transformer_relpos hf:swinv2",
    "R": "t:gcvit t:hiera t:shvit t:twins hf:hiera",
    "O": "t:metaformer t:nfnet t:sequencer hf:perceiver",
    "D": "hf:clip hf:metaclip_2 hf:siglip hf:siglip2",
    "G": "t:fastvit t:pit",
}
_CAUSE = {name: cause for cause, names in _MEMBERS.items() for name in names.split()}

Row = dict[str, Any]


def measure(name: str, seconds: float) -> Row:
    """Run one model in a new process and return its row."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record, errors = Path(folder) / "record", Path(folder) / "errors"
        # Forked, so that the imports are done once for all models.
        child = multiprocessing.get_context("fork").Process(target=_run_alone, args=(name, record, errors))
        child.start()
        child.join(seconds)
        timed_out = child.is_alive()
        child.kill()
        child.join()
        row: Row = {"name": name}
        for line in record.read_text().splitlines():
            if line.startswith("{"):
                row |= json.loads(line)
        messages = [line for line in errors.read_text().splitlines() if line.strip() and not line.startswith(" ")]
    row |= {"passed": row.get("step") == "done", "seconds": round(time.monotonic() - start, 1)}
    if not row["passed"]:
        ended = f"not done in {seconds:g} s" if timed_out else f"ended with code {child.exitcode}"
        row["error"] = messages[-1][:400] if messages and not timed_out else ended
    return row


def _run_alone(name: str, record: Path, errors: Path) -> None:
    for stream, path in ((1, record), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    run_case(name)


def read_rows(results: Path) -> dict[str, Row]:
    """Read the results; a later row of a model replaces an earlier one."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["name"]: row for row in rows}


def tables(rows: dict[str, Row]) -> str:
    """Return tables of passing models by source and root cause, of the longest traces, and of failing models."""
    cases = [case for case in population() if case.name not in NOT_APPLICABLE]
    lines = ["| source | models | measured | pass | anchor |", "|---|---:|---:|---:|---:|"]
    for source, anchor in {**ANCHOR, "both": sum(ANCHOR.values())}.items():
        names = [case.name for case in cases if source in (case.source, "both")]
        lines.append(_count(source, names, rows, f"{anchor} ({anchor / len(names):.0%})"))
    lines += ["", "| root cause in the anchor | models | measured | pass | anchor |", "|---|---:|---:|---:|---:|"]
    for cause, meaning in CAUSES.items():
        names = [case.name for case in cases if _CAUSE.get(case.name, "-") == cause]
        lines.append(_count(f"{cause}: {meaning}", names, rows, str(len(names)) if cause == "-" else "0"))
    shares = [row["share"] for row in rows.values() if "share" in row]
    lines += [
        "",
        f"{sum(share >= 0.95 for share in shares)} have at least 95 % of their parameters on a prunable axis.",
    ]
    lines += ["", "| longest traces | CPU s | groups |", "|---|---:|---:|"]
    traced = sorted((row for row in rows.values() if "trace_s" in row), key=lambda row: -row["trace_s"])
    lines += [f"| {row['name']} | {row['trace_s']:.2f} | {row['groups']} |" for row in traced[:10]]
    lines += ["", "| does not pass | at | reason |", "|---|---|---|"]
    lines += [
        f"| {case.name} | {row['step']} | {row['error'].replace('|', '/')} |"
        for case in cases
        if (row := rows.get(case.name)) and not row["passed"]
    ]
    lines += ["", "| below 95 % | share of the parameters on a prunable axis |", "|---|---:|"]
    lines += [f"| {name} | {row['share']:.1%} |" for name, row in rows.items() if row.get("share", 1) < 0.95]
    lines += ["", "| no reference for the mask oracle | why |", "|---|---|"]
    lines += [f"| {name} | {row['not_comparable']} |" for name, row in rows.items() if "not_comparable" in row]
    lines += ["", *(f"{name}: not applicable, {reason}." for name, reason in NOT_APPLICABLE.items())]
    return "\n".join(lines)


def _count(title: str, names: Sequence[str], rows: dict[str, Row], anchor: str) -> str:
    found = [rows[name] for name in names if name in rows]
    passed = sum(row["passed"] for row in found)
    share = f" ({passed / len(names):.0%})" if names else ""
    return f"| {title} | {len(names)} | {len(found)} | {passed}{share} | {anchor} |"


def main() -> None:
    """Run the models without a row, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("output/coverage.jsonl"))
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=600, help="limit for one model")
    parser.add_argument("--again", action="store_true", help="run failed models again")
    parser.add_argument("--list", action="store_true", help="only list the models and their states")
    parser.add_argument("--table", action="store_true", help="only print the tables of the existing rows")
    args = parser.parse_args()
    rows = read_rows(args.results)
    names = [case.name for case in population() if case.name not in NOT_APPLICABLE]
    unknown = set(args.only or ()) - set(names)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --list shows the names")
    if args.list:
        for case in population():
            row = rows.get(case.name)
            state = "open" if row is None else "passes" if row["passed"] else f"{row['step']}: {row['error']}"
            print(case.name, case.model, NOT_APPLICABLE.get(case.name, state))
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for name in () if args.table else args.only or names:
        if name in rows and not args.only and not (args.again and not rows[name]["passed"]):
            continue
        rows[name] = measure(name, args.seconds)
        with args.results.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
        row = rows[name]
        print(
            name, "passes" if row["passed"] else f"{row['step']}: {row['error']}", f"({row['seconds']} s)", flush=True
        )
    print(tables(rows))


if __name__ == "__main__":
    main()
