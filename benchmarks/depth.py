"""Print the time of a trace for networks of growing depth, as a Markdown table.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/depth.py [--repeats 5]

ViTs of width 384 with 12, 24 and 48 blocks and random weights: CPU seconds of one thread for `trace_groups` and for
`cost_model`, the shortest of all repeats.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from isoprune_hf import cost_model, load_base, trace_groups

DEPTHS = (12, 24, 48)


def best_time(work: Callable[[], Any], repeats: int) -> float:
    """Return the CPU seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print("| blocks | groups | trace s | for each block ms | cost s |\n|---:|---:|---:|---:|---:|")
    for depth in DEPTHS:
        model = load_base("timm/deit_small_patch16_224", pretrained=False, model_args={"depth": depth}).model
        groups = trace_groups(model)
        trace = best_time(lambda model=model: trace_groups(model), repeats)
        cost = best_time(lambda model=model, groups=groups: cost_model(model, groups), repeats)
        print(f"| {depth} | {len(groups)} | {trace:.2f} | {1000 * trace / depth:.1f} | {cost:.2f} |")


if __name__ == "__main__":
    main()
