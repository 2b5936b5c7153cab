"""A pruned module is trained on the batches that it was pruned with."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.own_nets import OwnNet, TwoInputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from isoprune_hf import FinetuneRecipe, finetune, prune
from isoprune_hf.errors import DatasetError, DivergedError, RecipeError

INPUTS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12, dtype=torch.int32) % 4
LOADER = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4, shuffle=True)
PLAIN = {"distillation": "none", "label_smoothing": 0.0}


class Endless:
    """Batches without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(INPUTS, LABELS)])


def make(width: int = 8) -> OwnNet:
    torch.manual_seed(0)
    return OwnNet(width)


def cut(model: nn.Module, data: Any, **settings: Any) -> Any:
    return prune(model, data, criterion="l1", ratio=0.5, round_to=2, **settings)


def test_loader_trains_as_a_loop_by_hand() -> None:
    pruned = cut(make(), LOADER)
    by_hand, batches = copy.deepcopy(pruned.model), [(INPUTS[:4], LABELS[:4]), (INPUTS[4:], LABELS[4:])]
    recipe = FinetuneRecipe(epochs=2, optimizer="sgd", momentum=0.0, learning_rate=0.1, weight_decay=0.0, **PLAIN)
    found = finetune(pruned, batches, recipe=recipe)
    losses = []
    for update in range(4):
        inputs, labels = batches[update % 2]
        loss = nn.functional.cross_entropy(by_hand(inputs), labels.long())
        by_hand.zero_grad()
        loss.backward()
        lr = 0.05 * (1 + torch.cos(torch.tensor(update / 4 * torch.pi)))
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= lr * parameter.grad
        losses.append(loss.item() * len(labels))
    assert [entry["train_loss"] for entry in found["history"]] == pytest.approx(
        [sum(losses[:2]) / 12, sum(losses[2:]) / 12], rel=1e-5
    )
    for ours, wanted in zip(pruned.model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-6)
    assert not pruned.model.training and all(p.grad is None for p in pruned.model.parameters())


def test_base_teaches_batches_without_targets() -> None:
    pruned = cut(make(), INPUTS)
    before = {name: value.clone() for name, value in pruned.base.state_dict().items()}
    apart = [nn.functional.mse_loss(pruned.model(INPUTS).softmax(1), pruned.base(INPUTS).softmax(1))]
    finetune(pruned, [INPUTS] * 8, recipe=FinetuneRecipe(epochs=4, learning_rate=0.02))
    apart.append(nn.functional.mse_loss(pruned.model(INPUTS).softmax(1), pruned.base(INPUTS).softmax(1)))
    assert apart[1] < 0.2 * apart[0]
    assert all(torch.equal(value, before[name]) for name, value in pruned.base.state_dict().items())
    assert pruned.base.training and all(p.requires_grad for p in pruned.base.parameters())


def test_training_repeats_and_keeps_random_state() -> None:
    results = []
    for _ in range(2):
        pruned, state = cut(make(), LOADER), torch.get_rng_state()
        finetune(pruned, LOADER, recipe=FinetuneRecipe(epochs=1))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(pruned.model.head.weight)
    assert torch.equal(*results)


def test_several_inputs_and_own_loss() -> None:
    torch.manual_seed(0)
    batch = {"image": torch.randn(4, 3, 4, 5), "extra": torch.randn(4, 6), "wanted": torch.zeros(4, 4)}

    def loss(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return (outputs["logits"] - batch["wanted"]).square().mean()

    pruned = cut(TwoInputs(8), [batch], inputs=["image", "extra"], loss=loss)
    recipe = FinetuneRecipe(epochs=30, learning_rate=0.05, distillation="none")
    history = finetune(pruned, [batch], recipe=recipe, loss=loss, inputs=["image", "extra"])["history"]
    assert history[-1]["train_loss"] < 0.05 * history[0]["train_loss"]


def test_half_precision_is_trained_in_float32() -> None:
    pruned = cut(make().bfloat16(), INPUTS.bfloat16())
    before = pruned.model.head.weight.clone()
    finetune(
        pruned, [(INPUTS, LABELS)] * 20, recipe=FinetuneRecipe(epochs=1, learning_rate=1e-3, ema_decay=0.5, best="ema")
    )
    assert pruned.model.head.weight.dtype == torch.bfloat16
    assert (pruned.model.head.weight != before).float().mean() > 0.5


REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], type[Exception]]] = {
    "mixup": (LOADER, {"mixup": 0.2}, {}, RecipeError),
    "teacher": (LOADER, {"teacher": "timm/resnet50"}, {}, RecipeError),
    "save": (LOADER, {}, {"save": print}, RecipeError),
    "generator": (iter([(INPUTS, LABELS)]), {}, {}, DatasetError),
    "length": (Endless(), {}, {}, RecipeError),
    "targets": ([INPUTS], {"distillation": "none"}, {}, RecipeError),
    "hard": ([(INPUTS, torch.rand(12, 4) * 3)], {"distillation": "hard"}, {}, RecipeError),
    "empty": ([], {}, {}, DatasetError),
    "class": ([(INPUTS, LABELS), (INPUTS, LABELS + 100)], {}, {}, DatasetError),
    "infinite": ([(INPUTS * 1e38, LABELS)], PLAIN, {}, DivergedError),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(kind: str) -> None:
    data, settings, options, error = REFUSED[kind]
    pruned = cut(make(), INPUTS)
    with pytest.raises(error):
        finetune(pruned, data, recipe=FinetuneRecipe(epochs=1, **settings), **options)
