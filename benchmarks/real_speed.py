"""Measure on EfficientNet-Lite with ImageNet weights how much accuracy is left for how many milliseconds.

    OMP_NUM_THREADS=1 python benchmarks/real_speed.py budgets --data DIR --workdir DIR --results FILE.jsonl
    ... steps --data DIR --workdir DIR --results FILE.jsonl
    ... table --results FILE.jsonl

`budgets` prunes to shares of the time in ONNX Runtime, and by MACs until the measured time is the same. `steps` goes
from the dense net in PyTorch to the pruned one in eight bits. Nets, photographs, splits and the workdir are those of
`real_accuracy.py`. Times are medians of the CPU milliseconds of one image on one thread, measured in turns for the
rows of one table. Every row is appended to the file of results as a line of JSON; later lines replace earlier ones.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_accuracy import BEST, Net, figures_of, open_nets, prune_with_recipe
from real_accuracy_data import EVALUATION_BATCH, NETS, logits_of, open_net
from transformers import BaseImageProcessor

from isoprune_hf import PruneRecipe, prune_model
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.export.executorch import open_executorch
from isoprune_hf.export.export import export_model
from isoprune_hf.export.formats import FORMATS, Format
from isoprune_hf.export.values import ExportPrecision
from isoprune_hf.measuring.folding import fold_batchnorm
from isoprune_hf.measuring.images import draw_images
from isoprune_hf.measuring.runtimes.engine import Pass, Runtime, torch_pass
from isoprune_hf.measuring.runtimes.onnx_runtime import Run, open_onnx
from isoprune_hf.measuring.runtimes.opened import open_models
from isoprune_hf.measuring.runtimes.openvino import open_openvino
from isoprune_hf.measuring.timing import Rounds, time_calls
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.scoring.scores import ImportanceScores

DEFAULTS = {"min_keep": 2, "round_to": 8}  # those of the command line
OPENERS: dict[Format, Callable[..., Run]] = {
    "onnx": partial(open_onnx, threads=1),
    "openvino": partial(open_openvino, threads=1),
    "executorch": open_executorch,  # on all threads
}
INT8_IMAGES = 256  # the default of the command line
SAME_TIME = 0.01
MAX_CUTS = 6
Models = Mapping[str, IsoPruneForImageClassification]
Record = dict[str, Any]


def time_onnx(models: Models, repeats: int) -> dict[str, float]:
    """Return the median CPU milliseconds of one image in ONNX Runtime, by name."""
    size = image_size_of(next(iter(models.values())))
    with open_models(models, size, Runtime("onnxruntime", threads=1)) as opened:
        passes = opened.time(1, Rounds(repeats, warmup=5, attempts=1)).passes
    return {name: statistics.median(passes[name].cpu) for name in models}


def macs_of_equal_time(
    net: Net, by_time: IsoPruneForImageClassification, settings: Mapping[str, Any], args: argparse.Namespace
) -> float:
    """Return the share of the MACs that takes as long as another cut, within one per cent, or the nearest of six cuts.

    Times depend on widths alone, so that these cuts are not repaired.
    """
    scores = ImportanceScores.load(
        args.workdir / f"{net.name}_{BEST['criterion']}_{net.seed}_{args.images}.safetensors"
    )
    images = net.photographs.batches(net.calibration(2), 2)  # of a rotation, which changes nothing here
    share = count_cost(by_time).macs / count_cost(net.model).macs
    tried: dict[float, float] = {}
    for _ in range(MAX_CUTS):
        recipe = PruneRecipe(
            criterion="trial_loss",
            allocation="knapsack",
            target_macs=f"{100 * share:.2f}%",
            reconstruct="none",
            **settings,
        )
        cut = prune_model(net.model, recipe, images, scores=scores).model
        times = time_onnx({"time": by_time, "macs": cut}, args.repeats)
        tried[share] = times["macs"] / times["time"]
        if abs(tried[share] - 1) < SAME_TIME:
            break
        share = min(share / tried[share], 1.0)
    return min(tried, key=lambda share: abs(tried[share] - 1))


def measure_budgets(net: Net, args: argparse.Namespace) -> list[Record]:
    """Prune to each share of the time by milliseconds and by MACs, and measure time and accuracy of both."""
    dense = f"dense, beside {' and '.join(f'{share:.0%}' for share in args.shares)}"
    models: dict[str, IsoPruneForImageClassification] = {dense: net.model}
    asked: dict[str, float] = {}
    for share in args.shares:
        in_time = {"target_macs": None, "target_latency": f"{100 * share:g}%", "latency_backend": "onnxruntime"}
        name = f"target_latency {share:.0%}"
        models[name], _ = prune_with_recipe(net, share, args.images, {**DEFAULTS, **in_time})
        asked[name] = share
        for round_to in args.round_to:
            settings = {**DEFAULTS, "round_to": round_to}
            macs = macs_of_equal_time(net, models[name], settings, args)
            by_macs = f"target_macs, round_to {round_to}, {share:.0%}"
            models[by_macs], _ = prune_with_recipe(net, macs, args.images, settings)
            asked[by_macs] = share
    times = time_onnx(models, args.repeats)
    return [
        {
            "kind": "budgets",
            "name": name,
            "asked": asked.get(name),
            "ms": times[name],
            **accuracy_of(net, torch_logits(net, model, args), args),
            "macs": count_cost(model).macs / count_cost(net.model).macs,
        }
        for name, model in models.items()
    ]


def torch_logits(net: Net, model: IsoPruneForImageClassification, args: argparse.Namespace) -> torch.Tensor:
    """Compute the logits of a model of PyTorch for the photographs to evaluate: (N, classes)."""
    return logits_of(model, net.photographs, net.held_out(args.held_out))


def accuracy_of(net: Net, logits: torch.Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Compute the figures of logits for the photographs to evaluate."""
    indices = net.held_out(args.held_out)
    return figures_of(logits, net.dense_logits()[indices], net.photographs.labels[indices])


def measure_steps(net: Net, processor: BaseImageProcessor, args: argparse.Namespace) -> list[Record]:
    """Measure time, size and accuracy from the dense net in PyTorch to the pruned one in eight bits."""
    images = draw_images(net.model, image_size_of(net.model), 1)
    folded, _ = fold_batchnorm(net.model, images)
    folded = folded.to(memory_format=torch.channels_last)
    megabytes = sum(value.nbytes for value in net.model.state_dict().values()) / 1e6
    calls: dict[str, Pass] = {
        "dense, PyTorch": torch_pass(net.model, images),
        "dense, PyTorch, channels_last, folded": torch_pass(
            folded, images.contiguous(memory_format=torch.channels_last)
        ),
    }
    rows = {
        name: {"megabytes": megabytes, **accuracy_of(net, torch_logits(net, model, args), args)}
        for name, model in zip(calls, (net.model, folded), strict=True)
    }
    models = {"dense": net.model}
    for share in args.budgets:
        models[f"{share:.0%} of the MACs"] = prune_once(net, share, args)
    pixels = images.numpy()
    for (kind, model), form in ((pair, form) for form in args.formats for pair in models.items()):
        for precision in ("fp32", "int8"):
            name = f"{kind}, {form}, {precision}"
            run, rows[name] = measure_export(net, model, processor, form, precision, args)
            calls[name] = lambda run=run: run(pixels)
    with torch.inference_mode():
        passes = time_calls(calls, Rounds(args.repeats, warmup=5, attempts=1)).passes
    return [
        {"kind": "steps", "name": name, "ms": statistics.median(passes[name].cpu), **row} for name, row in rows.items()
    ]


def prune_once(net: Net, share: float, args: argparse.Namespace) -> IsoPruneForImageClassification:
    """Prune to a share of the MACs, or open the model of an earlier call."""
    folder = args.workdir / f"{net.name}_{net.seed}_{args.images}_{share:g}"
    if not folder.is_dir():
        prune_with_recipe(net, share, args.images, DEFAULTS)[0].save_pretrained(folder)
    return IsoPruneForImageClassification.from_pretrained(folder).eval()


def measure_export(
    net: Net,
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    form: Format,
    precision: ExportPrecision,
    args: argparse.Namespace,
) -> tuple[Run, Record]:
    """Export a model, and return the function of the file, its size and its accuracy.

    The images of int8 are others than those that scores and repair were computed from.
    """
    batches = net.photographs.batches(net.calibration(args.images + INT8_IMAGES)[args.images :], EVALUATION_BATCH)
    calibration = [pixels.numpy() for pixels, _ in batches] if precision == "int8" else []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "exported"
        export = export_model(model, processor, folder, target=form, precision=precision, calibration=calibration)
        file = folder / FORMATS[form].file
        megabytes = sum(part.stat().st_size for part in folder.glob(f"{file.stem}.*")) / 1e6
        run = OPENERS[form](file)
    held_out = net.photographs.batches(net.held_out(args.held_out), EVALUATION_BATCH)
    logits = torch.from_numpy(np.concatenate([run(pixels.numpy()) for pixels, _ in held_out]))
    return run, {"megabytes": megabytes, **accuracy_of(net, logits, args), "quantization": dict(export.quantization)}


def read_rows(file: Path) -> dict[tuple[str, str], dict[str, Record]]:
    """Return the rows of each table by their names; a later line replaces an earlier one."""
    tables: dict[tuple[str, str], dict[str, Record]] = {}
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        tables.setdefault((record["kind"], record["net"]), {})[record["name"]] = record
    return tables


def write_table(tables: Mapping[tuple[str, str], Mapping[str, Record]], kind: str) -> str:
    """Return the Markdown table of all nets for a command."""
    column = "MACs %" if kind == "budgets" else "MB"
    lines = [
        f"| net | model | CPU ms | {column} | top-1 % | agreement % | loss | KL |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (of_kind, net), rows in tables.items():
        for name, row in rows.items() if of_kind == kind else ():
            size = f"{100 * row['macs']:.1f}" if kind == "budgets" else f"{row['megabytes']:.1f}"
            lines.append(
                f"| {net} | {name} | {row['ms']:.2f} | {size} | {row['top1']:.1f} ± {row['error']:.1f} | "
                f"{row['agreement']:.1f} | {row['loss']:.2f} | {row['kl']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("budgets", "steps"):
        options = commands.add_parser(command)
        options.add_argument("--data", type=Path, required=True, help="folder of Parquet files")
        options.add_argument("--workdir", type=Path, required=True, help="folder of pixels, logits and scores")
        options.add_argument("--weights", type=Path, help="folder of the packages; by default the installed ones")
        options.add_argument("--nets", nargs="+", choices=NETS, default=["lite0"])
        options.add_argument("--results", type=Path, required=True)
        options.add_argument("--images", type=int, default=200, help="calibration images")
        options.add_argument("--held-out", type=int, default=500, help="evaluated photographs")
        options.add_argument("--repeats", type=int, default=60)
        if command == "budgets":
            options.add_argument("--shares", nargs="+", type=float, default=[0.6, 0.5], help="of the milliseconds")
            options.add_argument("--round-to", nargs="+", type=int, default=[8], help="of the cuts by MACs")
        else:
            options.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5], help="shares of the MACs")
            options.add_argument("--formats", nargs="+", choices=OPENERS, default=["onnx"])
    options = commands.add_parser("table")
    options.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "table":
        tables = read_rows(args.results)
        print("\n\n".join(write_table(tables, kind) for kind in ("budgets", "steps")))
        return
    for name, opened in open_nets(args).items():
        net = Net(name, *opened, 0, args.workdir)
        if args.command == "budgets":
            rows = measure_budgets(net, args)
        else:
            rows = measure_steps(net, open_net(name, args.weights)[1], args)
        with args.results.open("a") as file:
            for row in rows:
                file.write(json.dumps({"net": name, **row}) + "\n")


if __name__ == "__main__":
    main()
