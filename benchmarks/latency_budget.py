"""Prune to half of the milliseconds in ONNX Runtime, and to the same MACs without them; print rows of a table.

    OMP_NUM_THREADS=1 python benchmarks/latency_budget.py [NAME ...] [--target 50%] [--runtime onnxruntime]

Weights are random and scored by L1 for the knapsack, so no network and no data are needed. Base and both cuts are then
timed in turns, in the runtime of the budget, with one image; each figure is the median CPU time of all passes, which
other programs change less than wall time. `gain` is the saved time as a share of the time that was to be saved.
"""

import argparse
import statistics
import time

import timm
import torch

from isoprune_hf import PruneRecipe, load_base, prune_model
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.measuring.runtimes.opened import open_models
from isoprune_hf.measuring.timing import Rounds
from isoprune_hf.recipes.budget import Budget

NAMES = ["timm/mobilenetv2_100", "timm/resnet50", "timm/deit_small_patch16_224", "timm/convnext_tiny"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--target", default="50%")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, CPU milliseconds\n")
    print("| model | base | asked | measured | gain | MACs | the same MACs without milliseconds | CPU s to prune |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.names:
        print(row(name, options), flush=True)


def row(name: str, options: argparse.Namespace) -> str:
    """Prune one model twice and time it; return its row."""
    base = load_base(name, pretrained=False).model
    start = time.process_time()
    by_time = prune_model(
        base,
        PruneRecipe(
            criterion="l1",
            allocation="knapsack",
            target_latency=options.target,
            latency_backend=options.runtime,
        ),
    )
    seconds = time.process_time() - start
    macs = by_time.pruned_cost.macs
    by_macs = prune_model(base, PruneRecipe(criterion="l1", allocation="knapsack", target_macs=str(macs)))
    models = {"base": base, "time": by_time.model, "macs": by_macs.model}
    with open_models(models, image_size_of(base), Runtime(options.runtime)) as opened:
        passes = opened.time(1, Rounds(options.repeats, warmup=5, attempts=1)).passes
    times = {key: statistics.median(passes[key].cpu) for key in models}
    asked = Budget.parse(options.target, "latency").resolve(times["base"])
    cells = [
        name,
        f"{times['base']:.2f}",
        f"{asked:.2f}",
        f"{times['time']:.2f}",
        f"{(times['base'] - times['time']) / (times['base'] - asked):.2f}",
        f"{macs / by_time.base_cost.macs:.1%}",
        f"{times['macs']:.2f}",
        f"{seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
