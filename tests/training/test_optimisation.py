import math
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.optimisation import build_optimizer, learning_rate_at


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)


def test_only_trainable_matrices_have_weight_decay():
    net = TinyNet()
    net.stem.requires_grad_(False)
    optimizer = build_optimizer(net, FinetuneRecipe(weight_decay=0.3))
    decay, rest = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert [id(parameter) for parameter in decay["params"]] == [id(net.head.weight)]
    assert [id(parameter) for parameter in rest["params"]] == [
        id(parameter) for parameter in (net.norm.weight, net.norm.bias, net.head.bias)
    ]


def test_frozen_model_is_refused() -> None:
    net = TinyNet().requires_grad_(False)
    with pytest.raises(RecipeError, match=r"no parameter of the model requires a gradient.*requires_grad_\(True\)"):
        build_optimizer(net, FinetuneRecipe())


def test_cosine_with_warm_up_follows_its_closed_form():
    recipe = FinetuneRecipe(epochs=5, learning_rate=1.0, min_learning_rate=0.2, warmup_epochs=1)
    rates = [learning_rate_at(update, recipe=recipe, updates_per_epoch=4) for update in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[12] == pytest.approx(0.6)  # half way between peak and end
    assert rates[8] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0.2 < rates[-1] < 0.21


def test_step_falls_every_few_epochs():
    recipe = FinetuneRecipe(epochs=9, learning_rate=1.0, schedule="step", step_epochs=2, step_gamma=0.1)
    rates = [learning_rate_at(update, recipe=recipe, updates_per_epoch=3) for update in (0, 5, 6, 11, 12)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_all_parameters_decay_where_the_rule_says_so():
    optimizer = build_optimizer(TinyNet(), FinetuneRecipe(weight_decay=0.3, weight_decay_rule="all"))
    assert [len(group["params"]) for group in optimizer.param_groups if group["weight_decay"]] == [6]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_timm_rule_excludes_tokens_and_positions(tmp_path: Path):
    model = make_base("deit", tmp_path)
    optimizer = build_optimizer(model, FinetuneRecipe(weight_decay=0.3, weight_decay_rule="timm"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {"model.cls_token", "model.dist_token", "model.pos_embed", "model.norm.weight"} <= free
    assert "model.head.weight" not in free and all(
        model.get_parameter(name).ndim < 2 or "token" in name or "pos" in name for name in free
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_epoch_schedule_equals_torch():
    recipe = FinetuneRecipe(epochs=5, learning_rate=1.0, min_learning_rate=0.2, schedule_unit="epoch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=0.2)
    for epoch in range(5):
        rates = {learning_rate_at(epoch * 4 + update, recipe=recipe, updates_per_epoch=4) for update in range(4)}
        assert len(rates) == 1 and rates.pop() == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        cosine.step()


def test_the_learning_rate_falls_from_layer_to_layer(tmp_path: Path):
    model = make_base("deit", tmp_path)
    recipe = FinetuneRecipe(learning_rate=1.0, layer_decay=0.5, weight_decay=0.3, weight_decay_rule="timm")
    groups = build_optimizer(model, recipe).param_groups
    names = {id(parameter): name for name, parameter in model.model.named_parameters()}
    scales = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    # Two blocks: the head has the whole rate, the last block and the norm behind it the half, the first a quarter.
    assert scales["head.weight"] == (1.0, 0.3) and scales["norm.weight"] == (0.5, 0.0)
    assert scales["blocks.1.mlp.fc1.weight"] == (0.5, 0.3) and scales["blocks.0.mlp.fc1.bias"] == (0.25, 0.0)
    assert scales["patch_embed.proj.weight"] == (0.125, 0.3) and scales["pos_embed"] == (0.125, 0.0)


def test_layer_decay_needs_named_layers(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"finetune\.layer_decay.*ViTForImageClassification"):
        build_optimizer(make_base("hf-vit", tmp_path), FinetuneRecipe(layer_decay=0.5))


def lamb_by_hand(weight: float, gradient: float, *, rate: float, decay: float) -> float:
    """Compute the first step of LAMB (You et al. 2020) for one number: Adam's direction, scaled to the weight."""
    direction = gradient / (abs(gradient) + 1e-6) + decay * weight
    trust = abs(weight) / abs(direction)
    return weight - rate * trust * direction


def test_timm_optimizers_follow_the_weight_decay_rule():
    net = TinyNet()
    optimizer = build_optimizer(net, FinetuneRecipe(optimizer="lamb", weight_decay=0.3, learning_rate=0.1))
    assert type(optimizer).__name__ == "Lamb" and [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    net = nn.Module()
    net.weight = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = build_optimizer(net, FinetuneRecipe(optimizer="lamb", weight_decay=0.3, learning_rate=0.1))
    net.weight.grad = torch.tensor([[0.5]])  # below 1, which timm's LAMB bounds the norm of all gradients to
    optimizer.step()
    assert net.weight.item() == pytest.approx(lamb_by_hand(2.0, 0.5, rate=0.1, decay=0.3), rel=1e-5)


def test_lion_steps_along_the_sign():
    net = nn.Module()
    net.weight = nn.Parameter(torch.tensor([[2.0, -1.0]]))
    optimizer = build_optimizer(net, FinetuneRecipe(optimizer="lion", weight_decay=0.5, learning_rate=0.1))
    net.weight.grad = torch.tensor([[3.0, -0.2]])
    optimizer.step()
    # Chen et al. 2023: w (1 - rate decay) - rate sign(...).
    assert net.weight.tolist()[0] == pytest.approx([2.0 * 0.95 - 0.1, -1.0 * 0.95 + 0.1])


def test_plain_names_are_the_optimizers_of_torch():
    for name, kind in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        optimizer = build_optimizer(TinyNet(), FinetuneRecipe(optimizer=name))
        assert type(optimizer) is kind and not optimizer.defaults.get("nesterov")


@pytest.mark.parametrize("name", ["adamx", "bnbadamw", "kron", "adahessian", "fusedlamb"])
def test_unknown_optimizer_raises(name: str):
    with pytest.raises(RecipeError, match=rf"finetune\.optimizer .*lamb.*'{name}'"):
        FinetuneRecipe(optimizer=name)
