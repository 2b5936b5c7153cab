"""The result of `prune` is trained in place, with the dense module as teacher."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isoprune_hf import (
    DataRecipe,
    FinetuneRecipe,
    IsoImageProcessor,
    Pruned,
    evaluate_model,
    finetune,
    load_data,
    prune,
)
from isoprune_hf.errors import RecipeError

SIDE = {"height": 8, "width": 8}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(self.conv(x).relu(), 2).flatten(1))


@pytest.fixture
def pruned() -> Pruned:
    torch.manual_seed(0)
    processor = IsoImageProcessor(size=SIDE, crop_size=SIDE, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    settings: dict[str, Any] = {"criterion": "l1", "ratio": 0.5, "calibration_batches": 1, "batch_size": 4}
    return prune(Net(), "digits", processor=processor, **settings)


def test_result_is_trained_in_place(pruned: Pruned) -> None:
    base = {name: value.clone() for name, value in pruned.base.state_dict().items()}
    recipe = FinetuneRecipe(epochs=1, batch_size=64, learning_rate=1e-3)
    found = finetune(pruned, "digits", recipe=recipe)
    before, after = (entry["top1"] for entry in found["history"])
    assert after > before + 0.05
    assert type(pruned.model) is Net
    assert not pruned.model.training
    assert all(torch.equal(value, base[name]) for name, value in pruned.base.state_dict().items())
    assert all(parameter.requires_grad for parameter in pruned.base.parameters())
    assert pruned.base.training


def test_recipe_may_have_no_teacher(pruned: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "isoprune_hf.training.finetune.finetune", lambda *_, teacher, **__: given.append(teacher) or {}
    )
    for options in ({}, {"teacher": "none"}, {"distillation": "none"}):
        finetune(pruned, DataRecipe(dataset="digits"), recipe=FinetuneRecipe(epochs=1, **options))
    assert [teacher is None for teacher in given] == [False, True, True]


def test_missing_processor_is_refused(pruned: Pruned) -> None:
    with pytest.raises(RecipeError, match="processor"):
        finetune(pruned.base, "digits")


def test_result_and_plain_modules_are_evaluated(pruned: Pruned) -> None:
    data = load_data(DataRecipe(dataset="digits"))
    split = data.evaluation.select(range(40))
    found = evaluate_model(pruned, split)
    assert found == evaluate_model(pruned.model, split, pruned.processor)
    pixels = pruned.processor([row["image"].convert("RGB") for row in split], return_tensors="pt").pixel_values
    hits = pruned.model(pixels).argmax(1) == torch.tensor(split["label"])
    assert (found["top1"], found["images"]) == (pytest.approx(hits.float().mean().item()), 40)
    with pytest.raises(RecipeError, match="processor"):
        evaluate_model(pruned.model, split)
    settings: dict[str, Any] = {"criterion": "taylor", "calibration_batches": 1, "batch_size": 4}
    assert prune(Net(), data, processor=pruned.processor, **settings).loss == "cross_entropy"
