"""Prune networks of all kinds as users do, each in a process of its own, and print tables of the results.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/coverage.py --population anchor [--images PARQUET]
    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/coverage.py --population named --sample 0.1 --seed 0

`anchor` is the smallest model of every file of timm and one of every type of transformers (`coverage_models.py`),
`named` every image classifier of up to 100 M parameters that timm, transformers and torchvision name, with few blocks
and small images where its constructor allows (`coverage_reduce.py`), and `tasks` small networks of the other tasks, of
every class of transformers that opens for one (`coverage_tasks.py`). Every model is pruned to half of its MACs in two
ways: `default`, the preset `best` with 16 images, and `plain`, the criterion `l1` without images; the steps are in
`coverage_case.py`. The models run in an order of which every beginning is a sample stratified by library and family.

A row of the results (JSON lines) is written when a model is done; the ways that a row has are skipped, and `--again`
repeats those that failed. When the default changes, `default` is removed from the rows: it is run again.
"""

import argparse
from pathlib import Path

from coverage_case import NUM_IMAGES
from coverage_images import read_images
from coverage_models import POPULATIONS, cases_of, sample
from coverage_run import RESULTS, Run, describe_row, known_rows, run_cases
from coverage_table import WAYS, documented, measured, passed, tables


def main() -> None:
    """Run the models without a row, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--population", choices=tuple(POPULATIONS), default="anchor")
    parser.add_argument("--results", type=Path, help="rows; by default coverage_POPULATION.jsonl in results/")
    parser.add_argument("--images", type=Path, metavar="PARQUET", help="images in a column img or image; or digits")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the models, by library and family")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and the order")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="ways to run; by default both")
    parser.add_argument("--workers", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=int, default=100, help="limit of CPU time for one way")
    parser.add_argument("--gigabytes", type=float, default=12, help="limit of address space for one process")
    parser.add_argument("--again", action="store_true", help="run failed models again")
    parser.add_argument("--list", action="store_true", help="only list the models and their states")
    parser.add_argument("--table", action="store_true", help="only print the tables of the existing rows")
    parser.add_argument("--page", type=Path, help="also write the tables into this page of docs/")
    args = parser.parse_args()
    results = args.results or RESULTS / f"coverage_{args.population}.jsonl"
    cases = sample(cases_of(args.population), args.sample, args.seed)
    unknown = set(args.only or ()) - {case.name for case in cases}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --list shows the names")
    if args.only:
        cases = [case for case in cases if case.name in args.only]
    rows = known_rows(args.population, results)
    if args.list:
        for case in cases:
            print(
                describe_row(rows[case.name]) if case.name in rows else f"{case.name}  open",
                case.args,
                case.side or "",
            )
        return
    if not args.table:
        is_done = passed if args.again else measured
        ways = {name: [way for way in args.ways if args.only or not is_done(row, way)] for name, row in rows.items()}
        todo = [(case, ways.get(case.name, args.ways)) for case in cases]
        run = Run(read_images(args.images, NUM_IMAGES), args.seconds, args.gigabytes)
        run_cases([(case, open_ways) for case, open_ways in todo if open_ways], run, args.workers, results)
    text = tables(cases, known_rows(args.population, results), args.population)
    print(text)
    if args.page is not None:
        page = documented(args.page.read_text(encoding="utf-8"), args.population, text)
        args.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
