"""The pruning methods that `pruned_accuracy.py` compares: torch-pruning, and recipes of isoprune_hf.

A method receives a `Case` (dense model, calibration images and labels, share of the MACs to keep, seed), and returns
the pruned model, with channels removed and not masked, and the wall seconds of its steps.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch_pruning
from prune_speed import PatchMergingPruner
from timm.layers import Attention
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import nn
from transformers.models.vit.modeling_vit import ViTAttention

from isoprune_hf import PruneRecipe, prune_model
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.recipes.presets import PRESETS

MICRO_BATCH = 64
# Search for the ratio of a share of MACs.
RATIO_STEP = 0.05
HALVINGS = 7  # of a step
SHARE_TOLERANCE = 0.002
PRUNING_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


class MethodError(Exception):
    """Raised when a method cannot prune a net."""


class Case(NamedTuple):
    """The arguments of a method.

    Args:
        model: The dense model, which must not be changed.
        images: Calibration images (N, C, H, W).
        labels: Their labels (N,).
        budget: Share of the MACs to keep.
        seed: Seed of the cell.
    """

    model: IsoPruneForImageClassification
    images: torch.Tensor
    labels: torch.Tensor
    budget: float
    seed: int

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the calibration images as micro-batches."""
        return list(zip(self.images.split(MICRO_BATCH), self.labels.split(MICRO_BATCH), strict=True))


Pruned = tuple[IsoPruneForImageClassification, dict[str, float]]
Method = Callable[[Case], Pruned]


def with_torch_pruning(
    case: Case,
    *,
    isomorphic: bool = True,
    normalizer: str | None = "mean",
    embedding: bool = True,
    recalibrate: bool = False,
) -> Pruned:
    """Prune with torch-pruning's BasePruner and GroupTaylorImportance; its ratio is searched to reach the budget.

    Args:
        case: The model, images and budget.
        isomorphic: Rank within isomorphic classes; otherwise rank all groups together.
        normalizer: Normalizer of the importance.
        embedding: Also prune the residual streams of transformers.
        recalibrate: Re-estimate the statistics of BatchNorm after pruning.

    Raises:
        MethodError: Every trial failed, or the net has no BatchNorm to recalibrate.
    """
    norms = [module for module in case.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if recalibrate and not norms:
        raise MethodError("the net has no BatchNorm")
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    gradients = mean_gradients(case)
    seconds["score"] = time.perf_counter() - start
    start, dense = time.perf_counter(), count_cost(case.model).macs
    trials: list[tuple[float, IsoPruneForImageClassification]] = []

    def try_ratio(ratio: float) -> float:
        trial = cut(case.model, gradients, ratio, isomorphic, normalizer, embedding)
        trials.append((count_cost(trial).macs / dense, trial))
        trials.sort(key=lambda found: abs(found[0] - case.budget))
        del trials[1:]
        return count_cost(trial).macs / dense

    try:
        reach_budget(try_ratio, case.budget)
    except PRUNING_ERRORS as error:
        if not trials:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise MethodError(f"torch-pruning fails: {cause[:150]}") from error
    _, pruned = trials[0]
    seconds["cut"] = time.perf_counter() - start
    if recalibrate:
        start = time.perf_counter()
        recalibrate_batchnorm(pruned, [images for images, _ in case.batches()])
        seconds["recalibrate"] = time.perf_counter() - start
    return pruned, seconds


def reach_budget(try_ratio: Callable[[float], float], budget: float) -> None:
    """Find the smallest ratio that reaches the budget: raise it in steps, then bisect the last step.

    The share is not monotonic in the ratio: torch-pruning skips a layer that would lose all its channels.
    """
    ratio, share = 0.0, 1.0
    while share > budget + SHARE_TOLERANCE and ratio < 1 - RATIO_STEP:
        ratio += RATIO_STEP
        share = try_ratio(ratio)
    low, high = ratio - RATIO_STEP, ratio
    for _ in range(HALVINGS):
        if abs(share - budget) <= SHARE_TOLERANCE:
            return
        share = try_ratio((low + high) / 2)
        low, high = ((low + high) / 2, high) if share > budget else (low, (low + high) / 2)


def mean_gradients(case: Case) -> dict[str, torch.Tensor]:
    """Return the gradients of the mean cross-entropy in eval mode."""
    model = copy.deepcopy(case.model).eval()
    for images, labels in case.batches():
        (model(images, labels).loss * len(labels) / len(case.labels)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def cut(
    model: IsoPruneForImageClassification,
    gradients: dict[str, torch.Tensor],
    ratio: float,
    isomorphic: bool,
    normalizer: str | None,
    embedding: bool,
) -> IsoPruneForImageClassification:
    """Prune a copy with torch-pruning: heads are kept, their dims are pruned, and the attention scale is adapted."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    network = model.model
    heads: dict[nn.Module, int] = {}
    ignored = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    for name, module in network.named_modules():
        if isinstance(module, Attention | WindowAttention):
            heads[module.qkv] = module.num_heads
        elif isinstance(module, ViTAttention):
            heads |= dict.fromkeys((module.q_proj, module.k_proj, module.v_proj), module.num_attention_heads)
        if not embedding and (name.endswith((".attn.proj", ".o_proj", ".fc2")) or is_embedding(name, module)):
            ignored.append(module)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        torch.zeros(1, *model.config.image_size, device=model.device),
        importance=torch_pruning.importance.GroupTaylorImportance(normalizer=normalizer),
        global_pruning=True,
        isomorphic=isomorphic,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=heads,
        output_transform=lambda output: output if isinstance(output, torch.Tensor) else output[0],
        customized_pruners={PatchMerging: PatchMergingPruner()},
        # Explicit, because the mutable defaults are shared by all pruners of a process.
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
    )
    pruner.step()
    for module in network.modules():  # as torch-pruning's examples do
        if isinstance(module, Attention | WindowAttention):
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
            module.scale = module.head_dim**-0.5
        elif isinstance(module, ViTAttention):
            module.head_dim = module.q_proj.out_features // module.num_attention_heads
            module.scaling = module.head_dim**-0.5
    model.zero_grad()
    return model.eval()


def is_embedding(name: str, module: nn.Module) -> bool:
    """Return True if a layer creates a residual stream of a transformer: a patch embedding or patch merging."""
    return isinstance(module, PatchMerging) or (isinstance(module, nn.Conv2d) and "patch_embed" in name)


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: list[torch.Tensor]) -> None:
    """Re-estimate the statistics of BatchNorm from the calibration images, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def with_best_of_torch_pruning(case: Case, *, recalibrate: bool = False) -> Pruned:
    """Prune with the best options of torch-pruning: global ranking, no normalizer, full streams below 50 % MACs."""
    embedding = case.budget >= 0.5
    return with_torch_pruning(case, isomorphic=False, normalizer=None, embedding=embedding, recalibrate=recalibrate)


def with_recipe(case: Case, **settings: Any) -> Pruned:
    """Prune with `prune_model` of isoprune_hf.

    Raises:
        MethodError: The recipe does not know a setting.
    """
    unknown = sorted(settings.keys() - {setting.name for setting in fields(PruneRecipe)})
    if unknown:
        raise MethodError(f"PruneRecipe does not know {', '.join(unknown)}")
    values = {"min_keep": 1, "round_to": 1, "seed": case.seed, "target_macs": f"{100 * case.budget:g}%", **settings}
    result = prune_model(case.model, PruneRecipe(**values), case.batches())
    return result.model, dict(result.seconds)


BEST = PRESETS["best"]
PLAIN = {"allocation": "class", "normalizer": "none", "rotate": False, "reconstruct": "none"}
RECIPES: dict[str, dict[str, Any]] = {
    "random": {**PLAIN, "criterion": "random"},
    "isomorphic": {**PLAIN, "criterion": "taylor"},
    "paper": {"preset": "paper"},
    "global": {**PLAIN, "criterion": "taylor", "scope": "global"},
    "local": {**PLAIN, "criterion": "taylor", "scope": "local"},
    "best": {"preset": "best"},
    "best_diagonal": {**BEST, "criterion": "gate_fisher"},
    "best_no_rotate": {**BEST, "rotate": False},
    "best_no_reconstruct": {**BEST, "reconstruct": "none"},
    "best_bn": {**BEST, "reconstruct": "bn"},
    "best_bias": {**BEST, "reconstruct": "bias"},
    "best_class": {**BEST, "allocation": "class"},
    "best_taylor": {**BEST, "criterion": "taylor"},
    "best_round8": {**BEST, "round_to": 8},
}
METHODS: dict[str, Method] = {
    "tp_iso": with_torch_pruning,
    "tp_iso_bn": partial(with_torch_pruning, recalibrate=True),
    "tp_iso_no_embedding": partial(with_torch_pruning, embedding=False),
    "tp_best": with_best_of_torch_pruning,
    "tp_best_bn": partial(with_best_of_torch_pruning, recalibrate=True),
    **{name: partial(with_recipe, **settings) for name, settings in RECIPES.items()},
}
