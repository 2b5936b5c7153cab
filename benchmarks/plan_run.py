"""Estimate the finetuning of a recipe on several GPUs: time, memory and cost, as a Markdown table.

    python benchmarks/plan_run.py recipes/deit_0.6g.yaml --gpus 8 64 --peak 312 --mfu 0.3 --price 2

Nothing is downloaded and no GPU is used. The model is pruned with random weights and gradients, as in
`reference_table.py`, so that its operations and the tensors that its backward pass saves are counted and not
estimated. The MFU is an assumption; the log of a run on the same GPUs has the measured value (`mfu`, with
`finetune.peak_tflops`). The formulas are those of docs/scaling.md.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from reference_table import head, score
from torch import Tensor, nn

from isoprune_hf import FinetuneRecipe, PruneRecipe, load_base, prune_model
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.cli.recipe_files import read_recipe
from isoprune_hf.commands.steps.training import count_training_flops
from isoprune_hf.pruning.cost.macs import count_cost

TRAIN_IMAGES, EVAL_IMAGES = 1_281_167, 50_000  # ImageNet-1K
# Bytes of optimizer state per parameter; optimizers that are not listed have two moments in fp32.
OPTIMIZER_BYTES = {"sgd": 4, "lion": 4}
COLUMNS = [
    *("recipe", "GPUs", "parts", "images per part", "GFLOP per image", "hours", "GPU-hours", "cost", "images/s"),
    *("loader cores per GPU", "states GiB", "activations GiB"),
]


@dataclass(frozen=True)
class Run:
    """The quantities that an estimate is computed from.

    Args:
        recipe: Settings of the finetuning.
        train_flops: Operations of training on one image, including those of the teacher.
        eval_flops: Operations of evaluating one image.
        params: Parameters of the student.
        teacher_params: Parameters of the teacher; 0 without one.
        kept_bytes: Bytes per image that the backward pass saves.
    """

    recipe: FinetuneRecipe
    train_flops: float
    eval_flops: float
    params: int
    teacher_params: int
    kept_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="recipe files")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument(
        "--peak", type=float, default=312.0, help="10^12 operations per second of a GPU, from its data sheet"
    )
    parser.add_argument("--mfu", type=float, default=0.3, help="assumed share of the peak, from 0 to 1")
    parser.add_argument("--price", type=float, default=2.0, help="price of a GPU-hour")
    parser.add_argument("--loader", type=float, default=365.0, help="images per second that one core loads")
    options = parser.parse_args()
    if not 0 < options.mfu <= 1 or min(options.peak, options.loader, *options.gpus) <= 0:
        parser.error("--mfu must be above 0 and at most 1, --peak, --loader and --gpus above 0")
    print(f"assumed: {options.peak:g} TFLOP/s a GPU, MFU {options.mfu:g}, {options.price:g} a GPU-hour\n")
    print(head(COLUMNS), flush=True)
    for file in options.recipes:
        run = open_run(file)
        for gpus in options.gpus:
            cells = plan(run, gpus, peak=options.peak, mfu=options.mfu, price=options.price, loader=options.loader)
            print(f"| {file.rpartition('/')[2].removesuffix('.yaml')} | {' | '.join(cells)} |", flush=True)


def open_run(file: str) -> Run:
    """Prune the model of a recipe file and count its operations, parameters and saved tensors."""
    values = read_recipe(file)
    prune, recipe = PruneRecipe(**values["prune"]), FinetuneRecipe(**values["finetune"])
    base = load_base(prune.model, pretrained=False, seed=prune.seed).model
    student, teacher = prune_model(base, prune, scores=score(base, prune)).model, None
    if recipe.distillation != "none" and recipe.teacher != "none":
        teacher = base if recipe.teacher == "auto" else load_base(recipe.teacher, pretrained=False).model
    return Run(
        recipe=recipe,
        train_flops=count_training_flops(student, None if recipe.teacher_cache else teacher),
        eval_flops=2.0 * count_cost(student).macs,
        params=count_cost(student).params,
        teacher_params=0 if teacher is None else count_cost(teacher).params,
        kept_bytes=count_kept_bytes(student, recipe),
    )


def count_kept_bytes(model: IsoPruneForImageClassification, recipe: FinetuneRecipe) -> float:
    """Count the bytes per image of the tensors that the backward pass saves, without parameters."""
    return _kept(model, recipe, 3) - _kept(model, recipe, 2)


def _kept(model: nn.Module, recipe: FinetuneRecipe, images: int) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # otherwise a later tensor could reuse an address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    pixels = torch.zeros(images, *model.config.image_size)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision != "no")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.train()(pixel_values=pixels)
    return sum(kept.values())


def count_seconds(run: Run, gpus: int, *, peak: float, mfu: float) -> float:
    """Compute the seconds of all epochs and evaluations, including those of the moving average."""
    recipe = run.recipe
    evaluations = math.ceil(recipe.epochs / recipe.evaluate_every) * (1 if recipe.ema_decay is None else 2)
    operations = recipe.epochs * TRAIN_IMAGES * run.train_flops + evaluations * EVAL_IMAGES * run.eval_flops
    return operations / (gpus * peak * 1e12 * mfu)


def count_state_bytes(run: Run, gpus: int) -> int:
    """Count the bytes on one GPU that do not depend on the batch.

    The student has weights and gradients in fp32, the moments of the optimizer, optionally a moving average, the
    buckets of DDP on several GPUs, and a 16-bit copy of the weights under autocast. The teacher has weights and that
    copy.
    """
    recipe = run.recipe
    half = 2 if recipe.precision != "no" else 0
    student = 8 + OPTIMIZER_BYTES.get(recipe.optimizer, 8) + half
    student += (4 if recipe.ema_decay is not None else 0) + (4 if gpus > 1 else 0)
    teacher = 4 + half if recipe.teacher_precision in (None, "no") else 2
    return run.params * student + (0 if recipe.teacher_cache else run.teacher_params * teacher)


def count_parts(recipe: FinetuneRecipe, gpus: int) -> int:
    """Return the parts of a batch: those of the recipe, or the number of GPUs if they cannot share them evenly."""
    parts = recipe.virtual_replicas or gpus * recipe.grad_accumulation
    return parts if parts % gpus == 0 else gpus


def plan(run: Run, gpus: int, *, peak: float, mfu: float, price: float, loader: float) -> list[str]:
    """Return the cells of a row, without the name."""
    recipe, seconds = run.recipe, count_seconds(run, gpus, peak=peak, mfu=mfu)
    parts = count_parts(recipe, gpus)
    changed = "*" if recipe.virtual_replicas not in (None, parts) else ""
    speed = gpus * peak * 1e12 * mfu / run.train_flops
    kept = run.kept_bytes * recipe.batch_size / parts
    hours = seconds / 3600
    return [
        str(gpus),
        f"{parts}{changed}",
        f"{recipe.batch_size / parts:g}",
        f"{run.train_flops / 1e9:.1f}",
        f"{hours:.1f}",
        f"{gpus * hours:.0f}",
        f"{gpus * hours * price:.0f}",
        f"{speed:.0f}",
        f"{speed / gpus / loader:.1f}",
        f"{count_state_bytes(run, gpus) / 2**30:.2f}",
        f"{kept / 2**30:.1f}",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
