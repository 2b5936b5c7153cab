"""Time pruning against torch-pruning's own pruner in one run and print a Markdown table.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/prune_speed.py [--models NAME ...] [--repeats 3]

Both sides trace, rank isomorphic classes by the sum of |w|, remove half of the channels and count the cost before and
after: isoprune_hf with `prune_model`, torch-pruning with `BasePruner(isomorphic=True, global_pruning=True)`, one
`step` and two `count_ops_and_params`. `without counting` leaves these two out of the time of torch-pruning alone,
whose pruner does not need them; isoprune_hf counts in either case. Weights are random and no gradient is taken, so no
network and no data are needed.

Times are CPU seconds of one thread (`time.process_time`), the median of all repeats; the order of the sides
alternates, and each side prunes a tiny model before it is timed. The copy of the model that torch-pruning prunes in
place is not timed; the copy that isoprune_hf makes is.

Memory: for each model and side a new process prunes a tiny model first, so that imports are not counted, then builds
the model and prunes it. The figure is the rise of the peak resident memory (`VmHWM`) over the resident memory in
between, divided by the rise in a process that only builds the model and runs one image without gradients.
"""

import argparse
import copy
import gc
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch_pruning
from timm.layers import Attention
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import nn

from isoprune_hf import PruneRecipe, prune_model
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification

MODELS = [
    "deit_base_distilled_patch16_224",
    "swin_base_patch4_window7_224",
    "convnext_base",
    "resnet152",
    "densenet201",
]
RATIO, HEAD_RATIO = 0.5, 0.5
IMAGE = (1, 3, 224, 224)


TINY = {"depth": 1, "embed_dim": 48, "num_heads": 3}


def build(name: str, **args: int) -> IsoPruneForImageClassification:
    torch.manual_seed(0)
    base = {"library": "timm", "architecture": name, "args": args}
    return IsoPruneForImageClassification(
        IsoPruneConfig(base=base, num_labels=1000, image_size=list(IMAGE[1:]))
    ).eval()


def prune_with_ours(model: IsoPruneForImageClassification) -> tuple[int, int]:
    """Prune with isoprune_hf; return the parameters before and after."""
    # Both sides keep Swin's heads: torch-pruning does not prune the tables of its position biases.
    head_ratio = 0.0 if "swin" in model.config.base["architecture"] else HEAD_RATIO
    recipe = PruneRecipe(
        criterion="l1", normalizer="none", ratio=RATIO, head_ratio=head_ratio, max_ratio=1.0, round_to=1, min_keep=1
    )
    result = prune_model(model, recipe)
    return result.base_cost.params, result.pruned_cost.params


class PatchMergingPruner(torch_pruning.BasePruningFunc):
    """Prunes a patch merging, whose norm and linear layer have four copies of each channel.

    Source:
        The examples of torch-pruning 1.6.1.
    """

    def prune_out_channels(self, layer: PatchMerging, idxs: list[int]) -> PatchMerging:
        torch_pruning.prune_linear_out_channels(layer.reduction, idxs)
        return layer

    def prune_in_channels(self, layer: PatchMerging, idxs: list[int]) -> PatchMerging:
        copies = [number * layer.dim + position for number in range(4) for position in idxs]
        torch_pruning.prune_linear_in_channels(layer.reduction, copies)
        torch_pruning.prune_layernorm_out_channels(layer.norm, copies)
        return layer

    def get_out_channels(self, layer: PatchMerging) -> int:
        return layer.reduction.out_features

    def get_in_channels(self, layer: PatchMerging) -> int:
        return layer.dim


def prune_with_torch_pruning(model: nn.Module) -> tuple[int, int, float]:
    """Prune in place; return the parameters before and after, and the CPU seconds that counting them took."""
    example = torch.zeros(IMAGE)
    start = time.process_time()
    num_heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(m, Attention | WindowAttention)}
    is_swin = any(isinstance(m, WindowAttention) for m in model.modules())
    _, before = torch_pruning.utils.count_ops_and_params(model, example)
    counting = time.process_time() - start
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=RATIO,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
        num_heads=num_heads,
        prune_num_heads=bool(num_heads) and not is_swin,
        prune_head_dims=True,
        customized_pruners={PatchMerging: PatchMergingPruner()} if is_swin else None,
        head_pruning_ratio=0.0 if is_swin else HEAD_RATIO,
        # Explicit, because the mutable defaults are shared by all pruners of a process.
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
    )
    pruner.step()
    for module in model.modules():  # as the reference script does explicitly
        if isinstance(module, Attention | WindowAttention):
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
            module.scale = module.head_dim**-0.5
    start = time.process_time()
    _, after = torch_pruning.utils.count_ops_and_params(model, example)
    return int(before), int(after), counting + time.process_time() - start


class Times(NamedTuple):
    """CPU seconds of each repeat; `counting` is a part of `theirs`."""

    ours: list[float]
    theirs: list[float]
    counting: list[float]


def time_both(name: str, repeats: int) -> tuple[Times, str, str]:
    """Return the times of both sides, why torch-pruning failed, and the kept shares of the parameters."""
    model = build(name)
    times, failed = Times([], [], []), ""
    left = ["", ""]
    sides = [0, 1]
    for _ in range(repeats):
        for side in sides:
            subject = copy.deepcopy(model.model) if side else model
            gc.collect()
            start = time.process_time()
            try:
                before, after, *counting = prune_with_torch_pruning(subject) if side else prune_with_ours(subject)
            except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
                if not side:
                    raise
                failed = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
                continue
            (times.theirs if side else times.ours).append(time.process_time() - start)
            times.counting.extend(counting)
            left[side] = f"{after / before:.0%}"
        sides.reverse()
    return times, failed, " / ".join(left)


def peak_rise(name: str, side: str) -> int:
    """Return the rise of the peak resident memory in bytes; call it in a new process."""
    work = {
        "ours": prune_with_ours,
        "theirs": lambda model: prune_with_torch_pruning(model.model),
        "forward": lambda model: torch.no_grad()(model)(torch.zeros(IMAGE)),
    }[side]
    work(build("vit_tiny_patch16_224", **TINY))
    gc.collect()
    before = read_memory("VmRSS")
    work(build(name))
    return read_memory("VmHWM") - before


def read_memory(field: str) -> int:
    """Return a memory field of this process in bytes; `ru_maxrss` would include the peak of the parent process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def measure_memory(name: str) -> dict[str, float | None]:
    """Return the rise in bytes of each side, measured in a new process; None if it failed."""
    rises = {}
    for side in ("forward", "ours", "theirs"):
        command = [sys.executable, __file__, "--peak", side, "--models", name]
        found = subprocess.run(command, capture_output=True, text=True)
        rises[side] = float(found.stdout.split()[-1]) if found.returncode == 0 else None
    return rises


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", choices=("ours", "theirs", "forward"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.peak:
        print(peak_rise(args.models[0], args.peak))
        return
    print(f"torch {torch.__version__}, timm {timm.__version__}, torch-pruning {torch_pruning.__version__}, ")
    print(f"median of {args.repeats}, CPU seconds of one thread; params left: ours / torch-pruning\n")
    columns = ["model", "ours s", "torch-pruning s", "ratio", "without counting s", "ratio", "params left"]
    print("| " + " | ".join([*columns, "peak memory, ours", "peak memory, torch-pruning"]) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        prune_with_ours(build("vit_tiny_patch16_224", **TINY))
        prune_with_torch_pruning(build("vit_tiny_patch16_224", **TINY).model)
        times, failed, left = time_both(name, args.repeats)
        rises = measure_memory(name)
        mine = statistics.median(times.ours)
        row = [name, f"{mine:.2f}", *([failed, "-", "-", "-"] if failed else ratios(mine, times)), left]
        peaks = [f"{rises[side] / rises['forward']:.2f}x" if rises[side] else "fails" for side in ("ours", "theirs")]
        print("| " + " | ".join([*row, *peaks]) + " |", flush=True)


def ratios(mine: float, times: Times) -> list[str]:
    """Return the seconds of torch-pruning and their ratio to `mine`, with and without its counting."""
    fair = [whole - counting for whole, counting in zip(times.theirs, times.counting, strict=True)]
    seconds = statistics.median(times.theirs), statistics.median(fair)
    return [cell for value in seconds for cell in (f"{value:.2f}", f"{value / mine:.1f}x")]


if __name__ == "__main__":
    main()
