"""Measure the training step of a recipe on one GPU: images per second, MFU, memory, and the largest batch.

    PYTHONPATH=. python benchmarks/gpu_training.py recipes/deit_0.6g.yaml --peak 989 [--batch_sizes 256 512]

The model is pruned by the recipe with random weights, the teacher has random weights, and the images are on the GPU,
so neither loader nor network is measured. The time is that of `Trainer.epoch`: mixup, forward passes of student and
teacher, backward pass, optimizer step, and logging. MFU counts the operations of both models, as the log does.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from reference_table import score
from torch import nn

from isoprune_hf import FinetuneRecipe, PruneRecipe, load_base, prune_model
from isoprune_hf.cli.recipe_files import read_recipe
from isoprune_hf.commands.steps.training import count_training_flops
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.epochs import TrainBatches
from isoprune_hf.data.loading import ImageBatch, LoaderOptions
from isoprune_hf.models import BaseModel
from isoprune_hf.training.progress import Progress
from isoprune_hf.training.student import open_student
from isoprune_hf.training.teacher import Teacher
from isoprune_hf.training.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "no"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "bf16, teacher in bf16": {"precision": "bf16", "teacher_precision": "bf16"},
    "the same, channels_last": {"precision": "bf16", "teacher_precision": "bf16", "channels_last": True},
    "the same, compiled": {
        "precision": "bf16",
        "teacher_precision": "bf16",
        "channels_last": True,
        "torch_compile": True,
    },
    "the same, without the teacher's passes": {
        "precision": "bf16",
        "channels_last": True,
        "torch_compile": True,
        "distillation": "none",
        "distillation_head": "logits",
    },
}
CLASSES = 1000


@contextlib.contextmanager
def trainer_of(
    student: BaseModel, teacher: nn.Module, recipe: FinetuneRecipe, accelerator: Accelerator
) -> Iterator[Trainer]:
    """Build the trainer that `finetune` builds for a recipe on one GPU."""
    names = tuple(map(str, range(CLASSES)))
    data = ImageData(None, None, names, "random", "0")
    trainer = Trainer(student.model, data, student.processor, recipe, accelerator=accelerator, options=LoaderOptions())
    open_teacher = None
    if recipe.distillation != "none":
        open_teacher = partial(Teacher, teacher, recipe, device=accelerator.device)
    with open_student(
        student.model,
        student.processor,
        recipe,
        accelerator,
        num_classes=CLASSES,
        open_teacher=open_teacher,
    ) as trainer.student:
        yield trainer


def time_step(trainer: Trainer, batch_size: int, *, warmup: int, updates: int) -> tuple[float, int]:
    """Return the seconds of an update, and the peak of allocated bytes."""
    device = trainer.accelerator.device
    generator = torch.Generator(device.type).manual_seed(0)
    images = torch.randn(batch_size, *trainer.model.config.image_size, device=device, generator=generator)
    labels = torch.randint(CLASSES, (batch_size,), device=device, generator=generator)
    batch = ImageBatch(labels, images, labels, torch.zeros(batch_size, dtype=torch.bool, device=device))

    def train(count: int) -> float:
        sizes = [batch_size] * count
        start = time.perf_counter()
        trainer.progress = Progress()
        trainer.epoch(TrainBatches([batch] * count, sizes, sizes))
        synchronize(device)
        return time.perf_counter() - start

    train(warmup)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = train(updates) / updates
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument("--peak", type=float, default=989.0, help="10^12 dense 16-bit operations a second of the GPU")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--largest", action="store_true", help="double the batch of the last variant until it fails")
    options = parser.parse_args()
    accelerator = Accelerator()
    device = accelerator.device
    values = read_recipe(options.recipe)
    prune, recipe = PruneRecipe(**values["prune"]), FinetuneRecipe(**values["finetune"])
    base = load_base(prune.model, pretrained=False, seed=prune.seed)
    cut = prune_model(base.model, prune, scores=score(base.model, prune)).model
    teacher = load_base(recipe.teacher, pretrained=False).model
    flops = count_training_flops(cut, teacher), count_training_flops(cut, None)
    cut.to(device), teacher.to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{options.recipe} on {name}, PyTorch {torch.__version__}, peak {options.peak:g} TFLOP/s")
    print(f"{flops[0] / 1e9:.1f} GFLOP an image with the teacher, {flops[1] / 1e9:.1f} without")
    print(
        "| precision | batch | images/s | TFLOP/s | MFU | most memory GiB |\n|---|---:|---:|---:|---:|---:|",
        flush=True,
    )

    def measure(variant: str, batch_size: int) -> None:
        settings = {**VARIANTS[variant], "batch_size": batch_size, "virtual_replicas": None, "epochs": 10**6}
        changed = replace(recipe, **settings)
        torch._dynamo.reset()
        with trainer_of(BaseModel(cut, base.processor), teacher, changed, accelerator) as trainer:
            seconds, memory = time_step(trainer, batch_size, warmup=4, updates=options.updates)
            trainer.student.optimizer.zero_grad()
        speed = batch_size / seconds
        tflops = speed * flops[changed.distillation == "none"] / 1e12
        cells = [variant, batch_size, f"{speed:.0f}", f"{tflops:.0f}", f"{tflops / options.peak:.3f}"]
        print(f"| {' | '.join(map(str, cells))} | {memory / 2**30:.1f} |", flush=True)

    for variant in options.variants:
        for batch_size in options.batch_sizes:
            measure(variant, batch_size)
    batch_size = options.batch_sizes[-1]
    while options.largest:
        batch_size *= 2
        try:
            measure(options.variants[-1], batch_size)
        except torch.OutOfMemoryError:
            print(f"{batch_size} images do not fit")
            break


if __name__ == "__main__":
    main()
