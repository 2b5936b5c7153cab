"""Foretell what a pruning costs before anything is scored: call `forecast`.

The unit is a pass: one forward pass of the base over all calibration images. A layer of the cut model counts by its
share of the budget, a forward with its backward pass three times. The products of the fits of a repair are counted in
multiply-adds, and compared with those of a pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.measuring.speed import measure_latency
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.layers import BatchNorm
from isoprune_hf.pruning.repairing.judging import FEW, HELD_OUT
from isoprune_hf.pruning.scoring.criteria.registry import CRITERIA
from isoprune_hf.pruning.scoring.criteria.trial_loss import TrialLoss, foretell_passes
from isoprune_hf.recipes import PruneRecipe

_TIMED_IMAGES = 4
WITH_BACKWARD = 3  # passes
_FORWARD_ONLY = ("activation_variance",)


@dataclass(frozen=True)
class Forecast:
    """Estimated cost of a pruning or a training.

    Args:
        images: Calibration images, or those of an epoch.
        passes: Stage (rotate, score, repair, evaluate, train) -> passes over them.
        products: Products of the fits of the repair, in passes.
        pass_seconds: Seconds of one pass on this rank, at the measured speed of a small batch.
        weight_bytes: Bytes of the weights.
        score_bytes: Bytes that a micro-batch keeps for the backward pass.
        stored_bytes: Largest outputs from which passes of the repair start, in memory or temporary files.
    """

    images: int
    passes: Mapping[str, float]
    products: float
    pass_seconds: float
    weight_bytes: int
    score_bytes: int
    stored_bytes: int

    def seconds(self, stage: str) -> float:
        """Return the estimated seconds of a stage."""
        return (self.passes[stage] + (self.products if stage == "repair" else 0)) * self.pass_seconds


def forecast(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    *,
    images: int,
    evaluated: int = 0,
    ranks: int = 1,
    is_scored: bool = False,
) -> Forecast:
    """Foretell the cost of pruning a base; one small batch is timed.

    Args:
        model: The base, on its device; left untouched.
        recipe: How to prune.
        images: Calibration images of all ranks.
        evaluated: Images on which the base and the cut model are evaluated.
        ranks: Processes that share the images.
        is_scored: The scores are known.
    """
    recipe = recipe.settled(has_images=images > 0)
    share = _kept_share(model, recipe)
    work, outputs, saved = _layer_work(model)
    macs = count_cost(model).macs
    copies = 2 - 1 / HELD_OUT if images >= FEW else 2
    is_fitted = recipe.reconstruct == "least_squares"
    reads = CRITERIA[str(recipe.criterion)].reads_images and not is_scored
    passes = {
        "rotate": float(bool(recipe.rotate)),
        "score": recipe.steps * reads * _passes_of_criterion(model, recipe, images),
        "repair": recipe.steps * _passes_of_repair(model, recipe, share, is_few=images < FEW),
        "evaluate": evaluated * (1 + share) / max(images, 1),
    }
    return Forecast(
        images=images,
        passes=passes,
        products=recipe.steps * is_fitted * copies * share * work / macs,
        pass_seconds=time_pass(model, images / ranks),
        weight_bytes=count_bytes(model),
        score_bytes=saved * recipe.batch_size if reads else 0,
        stored_bytes=math.ceil(2 * copies * outputs * images / ranks) if is_fitted else 0,
    )


def time_pass(
    model: IsoPruneForImageClassification,
    images: float,
    *,
    batch_size: int = _TIMED_IMAGES,
    runtime: Runtime = Runtime(),  # noqa: B008 a frozen value
) -> float:
    """Return the seconds of a forward pass over images, at the measured speed of a batch.

    Args:
        model: Left untouched.
        images: Number of images.
        batch_size: Images in the batch that is timed.
        runtime: Where it runs.
    """
    size = image_size_of(model)
    milliseconds = measure_latency({"": model}, size, batch_size=batch_size, runtime=runtime, repeats=3, warmup=1)
    return images * milliseconds[""] / 1e3 / batch_size


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _kept_share(model: IsoPruneForImageClassification, recipe: PruneRecipe) -> float:
    """Return the share of the operations that the cut model needs, as far as the recipe says it."""
    if recipe.budget is None:
        return (1 - recipe.ratio) ** 2
    if recipe.budget.is_share:
        return recipe.budget.value / 100
    if recipe.budget.kind == "latency":
        return 1.0
    cost = count_cost(model)
    whole = cost.macs if recipe.budget.kind == "macs" else cost.params
    return min(recipe.budget.value / whole, 1.0)


def _passes_of_criterion(model: IsoPruneForImageClassification, recipe: PruneRecipe, images: int) -> float:
    """Return the passes of a criterion that reads images, with those of trial cuts."""
    if recipe.criterion in _FORWARD_ONLY:
        return 1.0
    if recipe.criterion != TrialLoss.name or not images:
        return float(WITH_BACKWARD)
    groups = trace_groups(model, recipe.signature, recipe.engine)
    return WITH_BACKWARD + foretell_passes(model, groups, images=images, batch_size=recipe.batch_size)


def _passes_of_repair(
    model: IsoPruneForImageClassification, recipe: PruneRecipe, share: float, *, is_few: bool
) -> float:
    """Return the passes of a repair: those of the base, and those of the cut model at its share."""
    name = recipe.reconstruct
    if name in (None, "none"):
        return 0.0
    if name == "bn":
        return share
    if name == "bias":
        return 1 + 2 * share
    judged = 1.0 if is_few else 1 / HELD_OUT  # images that judge
    fitted = (0.5, 0.5, 1.0) if is_few else (1 - judged, 1.0)  # images of each fit
    dense = sum(fitted) if is_few else 1.0  # otherwise the fits share the outputs of the base
    has_norm = any(isinstance(module, BatchNorm) for module in model.modules())
    statistics = 1 + judged if is_few else 1.0
    return dense + judged + share * (3 * judged + has_norm * statistics + 2 * sum(fitted))


def _layer_work(model: IsoPruneForImageClassification) -> tuple[float, int, int]:
    """Run one image; return multiply-adds of the products of fits, and bytes of the largest output and for a backward.

    A fit of F features and O outputs multiplies each row by itself and by the outputs: F (F + O).
    """
    work, largest, saved = 0.0, 0, {}

    def on_call(module: nn.Linear | nn.Conv2d, args: Any, output: torch.Tensor) -> None:
        nonlocal work, largest
        features = module.weight[0].numel()
        width = len(module.weight) // (module.groups if isinstance(module, nn.Conv2d) else 1)
        work += output.numel() * features * (features + width) / width
        largest = max(largest, output.nbytes)

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(on_call) for layer in layers]
    image = torch.zeros(1, *image_size_of(model), device=model.device)
    try:
        with (
            scoring_mode(model, requires_grad=True),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        ):
            model(pixel_values=image.to(model.dtype))
    finally:
        for handle in handles:
            handle.remove()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return work, largest, sum(size for place, size in saved.items() if place not in weights)
