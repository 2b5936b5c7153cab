"""`taylor_reference` and `hessian_reference`: scores as torch-pruning 1.6.1 computes them; for parity only."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batch, Calibration, finite_batches
from isoprune_hf.pruning.calibration.gradients import (
    mean_over_ranks,
    scoring_mode,
    sum_over_ranks,
    zero_images,
    zero_sums,
)
from isoprune_hf.pruning.graph.layers import ConvNd
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask
from isoprune_hf.pruning.scoring.criteria.taylor import TAYLOR
from isoprune_hf.pruning.scoring.per_sample_gradients import looped_squares
from isoprune_hf.pruning.scoring.reduction import score_elements


class TaylorReference:
    """The Taylor score over the parameters that torch-pruning scores (see `scored_by_reference`)."""

    name = "taylor_reference"
    reads_images = True
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        return TAYLOR.score(replace(task, weights=scored_by_reference(task.model.model, task.weights)))


class HessianReference:
    """v = w^2 g^2, summed, where g is the gradient of the very last image (see `last_squared_gradient`)."""

    name = "hessian_reference"
    reads_images = True
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        squares = last_squared_gradient(task.model, task.weights, task.calibration)
        values = {name: weight.square() * squares.pop(name) for name, weight in task.weights.items()}
        return score_elements(task, values, "sum")


def scored_by_reference(base: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters that are part of torch-pruning's Taylor score.

    These are the weights of linears, of convolutions that are not depthwise, and of LayerNorm: no biases, no
    BatchNorm or GroupNorm, no tokens, positions or layer scale.

    Source:
        torch_pruning 1.6.1, `GroupTaylorImportance` with its defaults (bias=False, its `target_types`).
    """
    layers = dict(base.named_modules())
    return {
        name: weight
        for name, weight in weights.items()
        if name.endswith(".weight") and _is_scored(layers[name.removesuffix(".weight")])
    }


def _is_scored(layer: nn.Module) -> bool:
    if isinstance(layer, ConvNd):
        return layer.groups == 1 or layer.groups != layer.out_channels
    return isinstance(layer, nn.Linear | nn.LayerNorm)


def last_squared_gradient(
    model: IsoPruneForImageClassification, names: Iterable[str], calibration: Calibration
) -> dict[str, torch.Tensor]:
    """Compute the squared gradient of the very last image: a known defect, kept for parity with old scripts.

    torch-pruning 1.6.1 looks up the name of a parameter in a dictionary whose keys are parameters, so every image
    overwrites the previous one (`accumulate_grad`), and only the last one is used. The last micro-batch is on the
    highest of the ranks that have most micro-batches: number k is on rank k % world.

    Args, Returns and Raises as in `mean_squared_gradients`.
    """
    sums = zero_sums({name: model.model.get_parameter(name) for name in names})
    if not sums:
        return {}
    count = 0
    last: Batch | None = None
    for batch in finite_batches(calibration.batches):
        count += 1
        last = batch
    accelerator = calibration.accelerator
    rank = 0 if accelerator is None else accelerator.process_index
    world = 1 if accelerator is None else accelerator.num_processes
    counts = torch.zeros(world, dtype=torch.int64, device=model.device)
    counts[rank] = count
    by_rank = sum_over_ranks(counts, accelerator).tolist()
    owner = max(range(world), key=lambda number: (by_rank[number], number))
    images = zero_images(model)
    if rank == owner and last is not None:
        with scoring_mode(model, requires_grad=False):
            image, label = (part[-1:].to(model.device) for part in last)
            for name, square in looped_squares(model, tuple(sums), image, label, calibration.precision).items():
                sums[name] += square
        images += 1
    return mean_over_ranks(sums, images, accelerator)
