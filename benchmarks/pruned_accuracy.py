"""Compare the accuracy after pruning to equal MACs, of isoprune_hf and torch-pruning, on small nets trained here.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/pruned_accuracy.py train --workdir DIR
    ... measure --workdir DIR --results FILE.jsonl --finetune
    ... table --workdir DIR --results FILE.jsonl

`train` trains the dense nets (`pruned_accuracy_nets.py`) on images that are drawn from seeds
(`pruned_accuracy_data.py`). `measure` prunes them by every method (`pruned_accuracy_methods.py`) with 512 calibration
images (2,048 for `deit_tiny`), the same for all methods of a seed, and appends one line of JSON for each cell of net,
budget, seed and method. Existing cells are skipped, so that it can be stopped and restarted; `--part 0/4` to `3/4`
distribute the cells over four processes. Channels are removed, not masked, and MACs are counted by `count_cost`.
Finetuning uses two epochs of 1,500 new images (6,000 for `deit_tiny`) at two learning rates; the rate is chosen on
the selection split, and the table shows the accuracy on the report split. These are toy nets: they show which method
is better here, not by how much elsewhere.
"""

import argparse
import copy
import itertools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from pruned_accuracy_data import draw, stream_seed
from pruned_accuracy_methods import METHODS, Case, MethodError
from pruned_accuracy_nets import NETS, Net, accuracy, load_dense, read_dense, train, train_dense

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import IsoPruneError
from isoprune_hf.pruning.cost.macs import count_cost

EPOCHS, FINETUNING_BATCH = 2, 50
SPLITS = ("selection", "report")
STEPS = ("trace", "rotate", "score", "solve", "cut", "repair", "recalibrate", "all", "finetune")
MAX_SHARE_ERROR = 0.005  # of the MACs of the base; a larger deviation from the budget is shown in the table
Record = dict[str, Any]


def measure_cell(
    model: IsoPruneForImageClassification, name: str, method: str, budget: float, seed: int, *, finetune: bool
) -> Record:
    """Prune the dense model by a method and measure the pruned model; the dense model is not changed.

    Args:
        model: The dense model, or another model for the same images.
        name: Name in `NETS`.
        method: Name in `METHODS`.
        budget: Share of the MACs to keep.
        seed: Seed of the calibration and finetuning images.
        finetune: Also finetune the pruned model.

    Returns:
        The record: `skipped` with the reason if the method cannot prune this net; otherwise `share` of the MACs,
        `before` (split -> top-1 in percent), `seconds` and, with finetuning, `after` and `rates`.
    """
    net = NETS[name]
    record: Record = {"net": name, "method": method, "budget": budget, "seed": seed}
    drawn = draw(net.data, net.calibration, stream_seed("calibrate", seed))
    images, labels = (part.to(model.device) for part in drawn)
    start = time.perf_counter()
    try:
        pruned, seconds = METHODS[method](Case(model, images, labels, budget, seed))
    except (MethodError, IsoPruneError) as error:
        return {**record, "skipped": str(error)}
    record["share"] = count_cost(pruned).macs / count_cost(model).macs
    record["seconds"] = {**seconds, "all": time.perf_counter() - start}
    record["before"] = {split: accuracy(pruned, net.data, split) for split in SPLITS}
    if finetune:
        start = time.perf_counter()
        record["rates"] = {str(rate): finetuned(pruned, net, rate, seed) for rate in net.finetuning}
        record["after"] = max(record["rates"].values(), key=lambda found: found["selection"])
        record["seconds"]["finetune"] = (time.perf_counter() - start) / len(net.finetuning)
    return record


def finetuned(pruned: IsoPruneForImageClassification, net: Net, rate: float, seed: int) -> dict[str, float]:
    """Finetune a copy and return its top-1 on both splits."""
    model = copy.deepcopy(pruned)
    images, labels = draw(net.data, EPOCHS * net.epoch, stream_seed("finetune", seed))
    torch.manual_seed(seed)
    batches = list(zip(images.split(FINETUNING_BATCH), labels.split(FINETUNING_BATCH), strict=True))
    train(model, rate, batches, len(batches))
    return {split: accuracy(model, net.data, split) for split in SPLITS}


def read_results(files: list[Path]) -> dict[tuple[Any, ...], Record]:
    """Return the cells by (net, method, budget, seed); a later line replaces an earlier one."""
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
    found = {}
    for record in map(json.loads, lines):
        found[tuple(record[key] for key in ("net", "method", "budget", "seed"))] = record
    return found


def measure(args: argparse.Namespace) -> None:
    """Measure the cells that are missing in the file of results."""
    done = read_results([args.results])
    nets = {name: load_dense(name, args.workdir, args.device) for name in args.nets}
    part, parts = (int(number) for number in args.part.split("/"))
    cells = itertools.product(args.budgets, args.seeds, nets.items(), args.methods)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for budget, seed, (name, model), method in itertools.islice(cells, part, None, parts):
        there = done.get((name, method, budget, seed))
        if there and "skipped" not in there and ("after" in there or not args.finetune):
            continue
        record = measure_cell(model, name, method, budget, seed, finetune=args.finetune)
        what = f"{name} {method} {budget:.0%} seed {seed}"
        if "skipped" in record:
            print(f"{what}: skipped: {record['skipped']}", flush=True)
            continue
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        after = f" -> {record['after']['report']:.2f}" if args.finetune else ""
        seconds = record["seconds"]
        print(
            f"{what}: MACs {record['share']:.1%}, top-1 {record['before']['report']:.2f}{after}, "
            f"{seconds['all']:.1f} s + {seconds.get('finetune', 0):.1f} s",
            flush=True,
        )


def mean_and_error(values: list[float]) -> str:
    """Return the mean, and for two or more values the standard error."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{error}"


def describe_cell(records: list[Record], budget: float) -> str:
    """Return the top-1 on the report split before and after finetuning, and the MACs if they miss the budget."""
    if not records:
        return ""
    parts = [mean_and_error([record["before"]["report"] for record in records])]
    tuned = [record["after"]["report"] for record in records if "after" in record]
    if tuned:
        parts.append(mean_and_error(tuned))
    share = statistics.mean(record["share"] for record in records)
    return " → ".join(parts) + (f" at {share:.1%}" if abs(share - budget) > MAX_SHARE_ERROR else "")


def write_table(results: dict[tuple[Any, ...], Record], workdir: Path) -> str:
    """Return a Markdown table of methods by nets for each budget, and one of the seconds of pruning."""
    cells: dict[tuple[str, str, float], list[Record]] = defaultdict(list)
    for (name, method, budget, _), record in sorted(results.items(), key=lambda item: item[0][3]):
        cells[name, method, budget].append(record)
    parts = []
    for budget in sorted({budget for _, _, budget in cells}, reverse=True):
        found = {name: read_dense(name, workdir) for name in NETS if any(key[::2] == (name, budget) for key in cells)}
        parts += [
            f"\n### {budget:.0%} of the MACs\n",
            f"| method | {' | '.join(found)} |",
            f"|---|{'---:|' * len(found)}",
            f"| dense | {' | '.join(format(dense['report'], '.1f') for dense in found.values())} |",
        ]
        for method in (method for method in METHODS if any(key[1:] == (method, budget) for key in cells)):
            row = [describe_cell(cells.get((name, method, budget), []), budget) for name in found]
            parts.append(f"| `{method}` | {' | '.join(row)} |")
    return "\n".join([*parts, "", write_seconds(cells)])


def write_seconds(cells: dict[tuple[str, str, float], list[Record]]) -> str:
    """Return a table of the seconds of pruning and of its steps, averaged over all cells of a method."""
    spent: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, method, _), records in cells.items():
        for record in records:
            for step, seconds in record["seconds"].items():
                spent[method][step].append(seconds)
    steps = [step for step in STEPS if any(step in found for found in spent.values())]
    lines = ["### Seconds of pruning\n", f"| method | {' | '.join(steps)} |", f"|---|{'---:|' * len(steps)}"]
    for method in (method for method in METHODS if method in spent):
        found = [spent[method].get(step) for step in steps]
        row = ["" if values is None else f"{statistics.mean(values):.1f}" for values in found]
        lines.append(f"| `{method}` | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("train", "measure", "table"):
        options = commands.add_parser(command)
        options.add_argument("--workdir", type=Path, required=True, help="folder of the dense nets")
        if command != "table":
            options.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
            options.add_argument("--device", default="cpu")
        if command == "train":
            options.add_argument("--workers", type=int, default=0, help="processes that draw images")
        if command == "measure":
            options.add_argument("--part", default="0/1", help="cells K, K + N, K + 2N ... of all, as K/N")
            options.add_argument("--results", type=Path, required=True)
            options.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5, 0.3, 0.2])
            options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
            options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
            options.add_argument("--finetune", action="store_true")
        if command == "table":
            options.add_argument("--results", nargs="+", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "train":
        train_dense(args.nets, args.workdir, args.device, args.workers)
    elif args.command == "measure":
        measure(args)
    else:
        print(write_table(read_results(args.results), args.workdir))


if __name__ == "__main__":
    main()
