"""Compare a training step with a bare PyTorch loop: same model, batch and optimizer, timed in turns.

    python benchmarks/training_step.py [MODEL] [BATCH_SIZE] [ROUNDS]

The images of both are in memory, so the loader is not timed. In addition to the same forward and backward pass,
isoprune_hf checks for finite values, computes the gradient norm, derives seeds, updates the statistics of BatchNorm
and logs figures. Rounds of two updates alternate, so that other load on the machine affects both; CPU time excludes
it.
"""

import statistics
import sys
import time

import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf import FinetuneRecipe, load_base
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.epochs import TrainBatches
from isoprune_hf.data.loading import ImageBatch, LoaderOptions
from isoprune_hf.training.optimisation import build_optimizer
from isoprune_hf.training.progress import Progress
from isoprune_hf.training.student import open_student
from isoprune_hf.training.trainer import Trainer

UPDATES = 2


def main(name: str = "timm/deit_tiny_patch16_224", batch_size: str = "16", rounds: str = "8") -> None:
    recipe = FinetuneRecipe(epochs=1000, batch_size=int(batch_size), distillation="none")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device
    bases = [load_base(name, pretrained=False, num_labels=100) for _ in range(2)]
    models = [base.model.to(device) for base in bases]
    shape = models[0].config.image_size
    images = torch.randn(recipe.batch_size, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(recipe.batch_size) % 100
    optimizer = build_optimizer(models[0], recipe)
    classes = tuple(map(str, range(100)))
    trainer = Trainer(
        models[1],
        ImageData(None, None, classes, "random", "0"),
        bases[1].processor,
        recipe,
        accelerator=accelerator,
        options=LoaderOptions(),
    )
    sizes = [recipe.batch_size] * UPDATES

    def train_bare() -> None:
        models[0].train()
        for _ in range(UPDATES):
            optimizer.zero_grad()
            logits = models[0](pixel_values=images.to(device)).logits
            loss = nn.functional.cross_entropy(logits, labels.to(device), label_smoothing=recipe.label_smoothing)
            loss.backward()
            optimizer.step()
            loss.item()

    def train_ours() -> None:
        batch = ImageBatch(labels, images, labels, torch.zeros(len(labels), dtype=torch.bool))
        trainer.progress = Progress()
        trainer.epoch(TrainBatches([batch] * UPDATES, sizes, sizes))

    with open_student(models[1], bases[1].processor, recipe, accelerator, num_classes=100) as trainer.student:
        train_bare(), train_ours()  # warm up
        times = {train: ([], []) for train in (train_bare, train_ours)}
        for _ in range(int(rounds)):
            for train, (walls, works) in times.items():
                wall, work = time.perf_counter(), time.process_time()
                train()
                walls.append((time.perf_counter() - wall) / UPDATES)
                works.append((time.process_time() - work) / UPDATES)
    print(f"{name}, {recipe.batch_size} images, {device.type}, {torch.get_num_threads()} threads, {rounds} rounds")
    for kind, place in (("wall time", 0), ("CPU time", 1)):
        bare, ours = times[train_bare][place], times[train_ours][place]
        shares = [mine / other - 1 for mine, other in zip(ours, bare, strict=True)]
        bare_ms, ours_ms = 1e3 * statistics.median(bare), 1e3 * statistics.median(ours)
        overhead = f"{statistics.median(shares):.1%} (median over rounds), {min(ours) / min(bare) - 1:.1%} (best)"
        print(f"{kind:9}  bare {bare_ms:8.1f} ms an update, ours {ours_ms:8.1f} ms, overhead {overhead}")


if __name__ == "__main__":
    main(*sys.argv[1:])
