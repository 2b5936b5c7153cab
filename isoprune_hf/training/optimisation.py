"""Optimizer (`build_optimizer`) and learning-rate schedule (`learning_rate_at`)."""

import math
from collections.abc import Collection
from typing import Any

import torch
from timm.optim import (  # type: ignore[attr-defined]  # timm re-exports them from private modules without __all__
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe


def build_optimizer(model: nn.Module, recipe: FinetuneRecipe) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters; `weight_decay_rule` selects those with weight decay.

    With layer decay, groups of parameters have their share of the learning rate as `lr_scale`.

    Raises:
        RecipeError: Layer decay is set, and the network does not name its layers; or all parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(
            "finetune: no parameter of the model requires a gradient, so nothing can be trained; call "
            "requires_grad_(True) on the model, or on the parameters to train"
        )
    groups: list[dict[str, Any]] = _parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=recipe.optimizer, lr=recipe.learning_rate, momentum=recipe.momentum
    )
    return optimizer


def _parameter_groups(model: nn.Module, recipe: FinetuneRecipe) -> list[dict[str, Any]]:
    network = getattr(model, "model", model)  # timm names parameters without the wrapper's prefix
    groups: list[dict[str, Any]]
    excluded: Collection[str] = ()
    no_weight_decay = getattr(network, "no_weight_decay", None)
    if recipe.weight_decay_rule == "timm" and callable(no_weight_decay):
        excluded = no_weight_decay()
    if recipe.layer_decay is not None:
        if not hasattr(network, "group_matcher"):
            kind = type(network).__name__
            raise RecipeError(
                f"finetune.layer_decay: {kind} does not name its layers as timm models do; set it to null"
            )
        groups = param_groups_layer_decay(
            network,
            recipe.weight_decay,
            no_weight_decay_list=excluded,
            weight_decay_exclude_1d=recipe.weight_decay_rule != "all",
            layer_decay=recipe.layer_decay,
        )
    elif recipe.weight_decay_rule == "timm":
        groups = param_groups_weight_decay(network, recipe.weight_decay, no_weight_decay_list=excluded)
    else:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        min_dims = 0 if recipe.weight_decay_rule == "all" else 2
        groups = [
            {"params": [p for p in trainable if p.ndim >= min_dims], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trainable if p.ndim < min_dims], "weight_decay": 0.0},
        ]
    return groups


def learning_rate_at(update: int, *, recipe: FinetuneRecipe, updates_per_epoch: int) -> float:
    """Return the learning rate of an update, counted from 0 over all epochs.

    Linear warm-up reaches the peak with its last update. The cosine schedule then decays to `min_learning_rate` at the
    end of the last epoch. With `schedule_unit` epoch, the rate is constant within an epoch.
    """
    if recipe.schedule_unit == "epoch":
        update, updates_per_epoch = update // updates_per_epoch, 1
    warmup = recipe.warmup_epochs * updates_per_epoch
    if update < warmup:
        return recipe.learning_rate * min(1.0, (update + 1) / warmup)
    if recipe.schedule == "step":
        return recipe.learning_rate * recipe.step_gamma ** (update // updates_per_epoch // recipe.step_epochs)
    progress = (update - warmup) / (recipe.epochs * updates_per_epoch - warmup)
    span = recipe.learning_rate - recipe.min_learning_rate
    return recipe.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
