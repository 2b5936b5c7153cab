"""Count the passes, the time and the memory of the default preset, and print a Markdown table.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/preset_cost.py [--models NAME ...] [--images 64 128]
        [--predict 256 3200] [--size 224]

Prunes to 70 % of the MACs by the preset `best`, with random weights that keep all units active, smooth random images
and the labels that the base itself gives them: neither network nor data are needed.

A pass is one forward pass of the base over all images. The multiply-adds of the linear layers and convolutions that
run in a stage, on inputs of any batch size, are divided by those of a pass; a layer of the cut network counts by its
own size, and one whose gradients are computed three times. So the passes include those of single images with which
layers, heads and waypoints are found. Seconds are CPU seconds of one thread (`time.process_time`); memory is the peak
resident memory above that of the built base and its images. Every row is measured in a new process.

A predicted row continues the line through the last two measured ones; its passes and memory are the same sums.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers.oracles import randomize
from torch import nn
from torch.nn import functional

from isoprune_hf import PruneRecipe
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.pruning.pipeline import StageClock
from isoprune_hf.pruning.prune import prune_model

MODELS = ["resnet50", "deit_small_patch16_224", "convnext_tiny"]
MICRO_BATCH = 16
STAGES = ("trace", "rotate", "score", "solve", "cut", "repair")
COUNTED = ("rotate", "score", "repair")


def build(name: str, size: int) -> IsoPruneForImageClassification:
    base = {"library": "timm", "architecture": name, "args": {"img_size": size} if "patch" in name else {}}
    config = IsoPruneConfig(base=base, num_labels=1000, image_size=[3, size, size])
    model = IsoPruneForImageClassification(config).eval()
    with torch.no_grad():
        randomize(model, images=draw_images(16, size, seed=1))
    return model


def draw_images(count: int, size: int, *, seed: int) -> torch.Tensor:
    """Draw smooth images with some noise: (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 16, size // 16, generator=generator)
    smooth = functional.interpolate(coarse, size, mode="bicubic")
    return smooth + 0.3 * torch.randn(smooth.shape, generator=generator)


class LayerCount:
    """Counts the multiply-adds of linear layers and convolutions, those of backward passes included."""

    def __init__(self) -> None:
        self.total = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count all layers that run in the block that it wraps."""
        with nn.modules.module.register_module_forward_hook(self._add):
            yield

    def _add(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # A module before a waypoint is replaced and does not run.
        if isinstance(module, (nn.Linear, nn.Conv2d)) and "forward" not in vars(module):
            once = output.numel() * module.weight[0].numel()
            self.total += 3 * once if output.requires_grad else once


class Clock(StageClock):
    """Adds up the CPU seconds and the multiply-adds of each stage."""

    def __init__(self, layers: LayerCount) -> None:
        super().__init__()
        self._layers = layers
        self.work = dict.fromkeys(STAGES, 0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block that it wraps."""
        start, before = time.process_time(), self._layers.total
        # The trace follows every call, also that of a hook.
        with self._layers.counting() if name in COUNTED else nullcontext():
            yield
        self.seconds[name] += time.process_time() - start
        self.work[name] += self._layers.total - before


def measure(name: str, images: int, size: int) -> dict[str, Any]:
    """Prune a model; return passes and CPU seconds of each stage, and the memory."""
    model, layers = build(name, size), LayerCount()
    parts = draw_images(images, size, seed=2).split(MICRO_BATCH)
    with torch.no_grad(), layers.counting():
        start = time.process_time()
        labels = [model(pixel_values=part).logits.argmax(1) for part in parts]
        forward = time.process_time() - start
    whole, layers.total = layers.total, 0
    gc.collect()
    before, start = read_memory("VmRSS"), time.process_time()
    clock = Clock(layers)
    with mock.patch("isoprune_hf.pruning.prune.StageClock", lambda: clock):
        result = prune_model(model, PruneRecipe(target_macs="70%"), list(zip(parts, labels, strict=True)))
    return {
        "images": images,
        "work": clock.work,  # multiply-adds
        "pass": whole,
        "forward": forward,
        "seconds": time.process_time() - start,
        "stages": clock.seconds,
        "peak": read_memory("VmHWM") - before,
        "notes": result.plan.notes,
    }


def read_memory(field: str) -> int:
    """Return a memory field of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def run(name: str, images: int, size: int) -> dict[str, Any]:
    """Measure a model in a new process."""
    command = [sys.executable, __file__, "--one", "--models", name, "--images", str(images), "--size", str(size)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def predict(first: Any, second: Any, share: float) -> Any:
    """Continue the line from one result to another one, in all its numbers."""
    if isinstance(first, dict):
        return {key: predict(first[key], second[key], share) for key in first}
    return first if isinstance(first, list) else first + (second - first) * share


def row(name: str, found: Mapping[str, Any], remark: str = "") -> str:
    """Return a row of the table."""
    passes = {stage: found["work"][stage] / found["pass"] for stage in COUNTED}
    cells = [
        name,
        f"{found['images']:.0f}{remark}",
        *(f"{passes[stage]:.2f}" for stage in COUNTED),
        f"{sum(passes.values()):.2f}",
        *(f"{found[key]:.1f}" for key in ("forward", "seconds")),
        f"{found['stages']['repair']:.1f}",
        f"{found['peak'] / 2**30:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--images", type=int, nargs="+", default=[64])
    parser.add_argument("--predict", type=int, nargs="+", default=[])
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.one:
        print(json.dumps(measure(args.models[0], args.images[0], args.size)))
        return
    print("| model | images | rotate | score | repair | all passes | s of a pass | s | of it repair | peak GiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in args.models:
        results = [run(name, images, args.size) for images in args.images]
        for found in results:
            print(row(name, found), flush=True)
        for images in args.predict if len(results) > 1 else ():
            first, second = results[-2:]
            share = (images - first["images"]) / (second["images"] - first["images"])
            print(row(name, predict(first, second, share), " (predicted)"), flush=True)


if __name__ == "__main__":
    main()
