"""CORP (Zhang and Yang, arXiv 2602.05243), a peer in `real_accuracy.py`: hidden channels are cut in closed form.

From the paper's abstract: removed components are modelled as affine functions of the kept ones, by a ridge regression
over unlabelled images, which is folded into the weights of the layer that reads them; all statistics are those of the
dense network, from one pass over the images, without gradients. The formulas are those of that regression, not copied
from the paper's text: x_K and x_R being the kept and the removed hidden channels as a layer (W, b) reads them, with
mean m and covariance C,

    rank    E[x_c^2]; each hidden layer loses the same share of its channels, those with the lowest values
    fit     B = C_RK (C_KK + lambda I)^-1,   x_R ~ B (x_K - m_K) + m_R
    fold    W_K + W_R B   and   b + W_R (m_R - B m_K)

Chosen here, since only the abstract was at hand, and not tuned: the size of lambda; the plain second moment as rank,
without a factor for the weights of the reader; and, for convolutions, that a hidden channel is one that a single
pointwise layer reads into fewer outputs (the expanded channels of an inverted residual block, after the depthwise
convolution). Nothing else is cut: neither residual streams nor attention, for which the paper fits logits.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from pruned_accuracy_methods import Case, MethodError, Pruned
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.graph.find_groups import TracedGroups, trace_groups
from isoprune_hf.pruning.graph.layers import is_depthwise
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.readers import find_readers, reading_layer

RIDGE = 1e-3  # lambda, as a share of the mean variance of the kept channels
HALVINGS = 12  # of the share that is removed


class Hidden(NamedTuple):
    """A group of hidden channels.

    Args:
        name: Name of the group.
        reader: Name of the layer that reads it.
        places: Positions of the channels in the input of that layer, (channels,).
    """

    name: str
    reader: str
    places: torch.Tensor


class Moments(NamedTuple):
    """Mean and covariance of the input channels of a layer, over images and positions: (C,), (C, C), in float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


def with_corp(case: Case) -> Pruned:
    """Prune with CORP; the share of the hidden channels that is removed is searched to reach the budget.

    Raises:
        MethodError: The net has no hidden channels, or too few to reach the budget.
    """
    start = time.perf_counter()
    groups = trace_groups(case.model)
    hidden = [found for group in groups if (found := find_hidden(case.model, group)) is not None]
    if not hidden:
        raise MethodError("the net has no hidden channels")
    moments = moments_of(case, hidden)
    seconds = {"score": time.perf_counter() - start}
    start = time.perf_counter()
    plan, pruned = reach_budget(case, groups, hidden, moments)
    for group in hidden:
        compensate(case.model, pruned, group, torch.tensor(plan.kept[group.name]), moments[group.reader])
    return pruned, {**seconds, "cut": time.perf_counter() - start}


def find_hidden(model: IsoPruneForImageClassification, group: CoupledGroup) -> Hidden | None:
    """Return a group as hidden channels if one pointwise layer reads them into fewer outputs, else None.

    Depthwise convolutions before that layer do not count, and the classifier is no such layer.
    """
    readers = {reader.layer: reader for reader in find_readers(model, group)}
    mixing = [name for name in readers if not _is_depthwise(reading_layer(model, name))]
    if len(mixing) != 1 or readers[mixing[0]].places.shape[1] != 1:
        return None
    weight = reading_layer(model, mixing[0]).weight
    is_pointwise = weight[0, 0].numel() == 1 and weight.shape[1] == group.channels
    if not is_pointwise or not model.config.num_labels != len(weight) < group.channels:
        return None
    return Hidden(group.name, mixing[0], torch.from_numpy(readers[mixing[0]].places[:, 0]))


@torch.no_grad()
def moments_of(case: Case, hidden: list[Hidden]) -> dict[str, Moments]:
    """Compute the moments of the inputs of the readers of the dense net, in one pass over the images."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else args[0]
        x = torch.nn.functional.pad(x.flatten(0, -2), (0, 1), value=1.0)
        sums[name] = sums.get(name, 0) + (x.T @ x).double()

    readers = {group.reader: reading_layer(case.model, group.reader) for group in hidden}
    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in readers.items()]
    try:
        for images, _ in case.batches():
            case.model(pixel_values=images)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, products in sums.items():
        products = products / products[-1, -1]
        mean = products[-1, :-1]
        found[name] = Moments(mean, products[:-1, :-1] - torch.outer(mean, mean))
    return found


def reach_budget(
    case: Case, groups: TracedGroups, hidden: list[Hidden], moments: Mapping[str, Moments]
) -> tuple[PruningPlan, IsoPruneForImageClassification]:
    """Cut the smallest share of the channels of all hidden layers that reaches the budget, found by bisection.

    Raises:
        MethodError: One channel in each hidden layer is still too much.
    """
    low, high = 0.0, 1.0
    best = None
    for share in (high, *[None] * HALVINGS):
        share = (low + high) / 2 if share is None else share
        plan = plan_of_share(hidden, moments, share)
        pruned = apply_plan(case.model, plan, groups)
        cost = pruned.config.cost
        if cost["pruned"]["macs"] > case.budget * cost["base"]["macs"]:
            low = share
        else:
            high, best = share, (plan, pruned)
    if best is None:
        raise MethodError(f"hidden channels alone do not reach {case.budget:.0%} of the MACs")
    return best


def plan_of_share(hidden: list[Hidden], moments: Mapping[str, Moments], share: float) -> PruningPlan:
    """Return the plan that removes a share of the channels of each hidden layer, those with the least E[x^2]."""
    kept = {}
    for group in hidden:
        mean, covariance = moments[group.reader]
        squares = (covariance.diagonal() + mean.square())[group.places]
        count = max(1, round(len(squares) * (1 - share)))
        kept[group.name] = tuple(sorted(squares.argsort(descending=True)[:count].tolist()))
    return PruningPlan(kept=kept, heads={})


@torch.no_grad()
def compensate(
    dense: IsoPruneForImageClassification,
    pruned: IsoPruneForImageClassification,
    group: Hidden,
    kept: torch.Tensor,
    moments: Moments,
) -> None:
    """Fold the regression of the removed channels on the kept ones into their reader in the cut net, in place."""
    is_kept = torch.zeros(len(group.places), dtype=torch.bool)
    is_kept[kept] = True
    keep, remove = group.places[is_kept].sort().values, group.places[~is_kept]
    mean, covariance = moments
    damping = RIDGE * covariance.diagonal()[keep].mean()
    matrix = covariance[keep][:, keep] + damping * torch.eye(len(keep), dtype=torch.float64)
    slope = torch.linalg.solve(matrix, covariance[keep][:, remove]).T
    old, layer = reading_layer(dense, group.reader).weight, reading_layer(pruned, group.reader)
    lost = old.double().flatten(1)[:, remove]
    layer.weight += (lost @ slope).reshape(layer.weight.shape).to(old.dtype)
    shift = (lost @ (mean[remove] - slope @ mean[keep])).to(old.dtype)
    layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and is_depthwise(layer)
