"""Every kind of target and output is scored by its loss, or is refused by name before any work."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isoprune_hf import prune
from isoprune_hf.errors import DatasetError, RecipeError

DEAD = (1, 2, 5)
KEPT = (0, 3, 4, 6, 7)


class Net(nn.Module):
    """Eight hidden channels, of which those in `DEAD` do nothing."""

    def __init__(self, outputs: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, outputs, 1)
        with torch.no_grad():
            for tensor in (self.conv.weight, self.conv.bias, self.head.weight.transpose(0, 1)):
                tensor[list(DEAD)] = 0

    def pixels(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.pixels(x).mean((2, 3))


class PixelNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.pixels(x)


class FlatNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.pixels(x).mean((1, 2, 3))


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        found = self.pixels(x)
        return {"map": found, "pooled": (found.mean((2, 3)), None)}


class TwoInputs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(2, 4)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        return super().forward(image) * self.scale(extra).sigmoid()


def make(kind: type[Net] = Net, *args: int) -> Net:
    torch.manual_seed(0)
    return kind(*args)


def images(samples: int = 6) -> Tensor:
    return torch.randn(samples, 3, 4, 5, generator=torch.Generator().manual_seed(1))


CRITERIA = ["gate_fisher_joint", "taylor", "hessian"]
TARGETS = {
    "classes": (Net, torch.tensor([0, 1, 2, 3, 0, 1]), "cross_entropy"),
    "shares": (Net, torch.full((6, 4), 0.25), "cross_entropy"),
    "labels": (Net, torch.tensor([[0, 1, 1, 0]] * 6), "binary_cross_entropy"),
    "values": (Net, torch.linspace(-2, 2, 24).view(6, 4), "squared_error"),
    "one value": (FlatNet, torch.linspace(-2, 2, 6), "squared_error"),
    "map of classes": (PixelNet, torch.zeros(6, 4, 5, dtype=torch.int64), "cross_entropy"),
    "map of values": (PixelNet, torch.randn(6, 4, 4, 5), "squared_error"),
    "no targets": (Net, None, "cross_entropy"),
    "no targets of a map": (PixelNet, None, "squared outputs"),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("case", TARGETS)
def test_loss_follows_from_targets(case: str, criterion: str) -> None:
    kind, targets, loss = TARGETS[case]
    data = [images()] if targets is None else [(images(), targets)]
    result = prune(make(kind), data, criterion=criterion, ratio=3 / 8, round_to=1)
    assert result.loss == loss
    assert result.plan.kept == {"conv": KEPT}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("targets", "loss"),
    [
        (torch.tensor([0, 1, 1, 0, 1, 0]), "binary_cross_entropy"),
        (torch.tensor([[0.0], [1.0]] * 3), "binary_cross_entropy"),
        (torch.linspace(-2, 2, 6), "squared_error"),
    ],
)
def test_one_output_has_a_loss(criterion: str, targets: Tensor, loss: str) -> None:
    result = prune(make(Net, 1), [(images(), targets)], criterion=criterion, ratio=3 / 8, round_to=1)
    assert result.loss == loss
    assert result.plan.kept == {"conv": KEPT}


def read_map(outputs: Any, batch: Any) -> Tensor:
    assert outputs["pooled"][1] is None
    assert batch["labels"].dtype == torch.int64
    assert batch["note"] == "x"
    pooled = nn.functional.cross_entropy(outputs["pooled"][0], batch["labels"])
    return pooled + (outputs["map"].mean(1) - batch["pixel_values"].mean(1)).square().mean()


@pytest.mark.parametrize("criterion", [*CRITERIA, "l1"])
def test_loss_of_caller_gets_outputs_and_batch(criterion: str) -> None:
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2, 3, 0, 1]), "note": "x"}
    net = make(TwoOutputs)
    result = prune(net, [batch], loss=read_map, criterion=criterion, ratio=3 / 8, round_to=1)
    assert result.plan.kept == {"conv": KEPT}
    assert type(result.model) is TwoOutputs
    assert result.model.head.out_channels == 4  # what the model returns keeps its size
    found, expected = (module.eval()(images()) for module in (result.model, net))
    torch.testing.assert_close(found, expected)


def test_batch_of_another_form_is_refused() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    data = [(images(), labels), {"image": images(), "label": labels}]
    with pytest.raises(DatasetError, match="form"):
        prune(make(), data, loss=lambda outputs, batch: outputs.square().mean(), criterion="taylor")


def test_mean_and_single_losses_score_alike() -> None:
    data = [(images(), torch.tensor([0, 1, 2, 3, 0, 1]))]

    def mean(outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def single(outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")

    scores = [
        prune(make(), data, loss=loss, criterion="gate_fisher", round_to=1).scores.scores["conv"]
        for loss in (None, mean, single)
    ]
    assert all(torch.allclose(score, scores[0], rtol=1e-5) for score in scores)


@pytest.mark.parametrize("criterion", [*CRITERIA, None])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs_are_given_to_the_model(form: str, criterion: str | None) -> None:
    net, extra, labels = make(TwoInputs), torch.randn(6, 2), torch.tensor([0, 1, 2, 3, 0, 1])
    batch: Any = (images(), labels, extra) if form == "tuple" else {"extra": extra, "image": images(), "label": labels}
    keys: Any = [0, 2] if form == "tuple" else ["image", "extra"]
    settings = {} if criterion is None else {"criterion": criterion}
    result = prune(net, [batch], inputs=keys, ratio=3 / 8, round_to=1, **settings)
    assert result.plan.kept == {"conv": KEPT}
    assert type(result.model) is TwoInputs
    torch.testing.assert_close(result.model(images(), extra), net.eval()(images(), extra), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", TARGETS)
def test_best_preset_repairs_every_kind(case: str) -> None:
    kind, targets, _ = TARGETS[case]
    data = [images()] if targets is None else [(images(), targets)]
    net = make(kind)
    result = prune(net, data, ratio=3 / 8, round_to=1)
    assert result.plan.kept == {"conv": KEPT}
    found, expected = (module.eval()(images()) for module in (result.model, net))
    assert (found - expected).norm() < 1e-2 * expected.norm()


def no_gradient(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.detach().sum()


def not_finite(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.sum() * math.nan


def failing(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.sum() + batch["labels"]


@pytest.mark.parametrize("loss", [no_gradient, not_finite, failing, "hinge"])
def test_unusable_loss_is_refused(loss: Callable[[Any, Any], Tensor] | str) -> None:
    with pytest.raises(RecipeError, match="loss"):
        prune(make(), [(images(), torch.zeros(6, dtype=torch.int64))], loss=loss)


def test_cross_entropy_of_one_output_is_refused() -> None:
    with pytest.raises(RecipeError, match="cross_entropy"):
        prune(make(Net, 1), [(images(), torch.zeros(6, dtype=torch.int64))], loss="cross_entropy")


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (torch.full((6,), 7), "7"),
        (torch.zeros(6, 3), "3"),
        (torch.zeros(5, dtype=torch.int64), "5 targets"),
        (["a"] * 6, "list"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: Any, named: str) -> None:
    with pytest.raises(DatasetError, match=named):
        prune(make(), [(images(), targets)], criterion="taylor")


def test_several_outputs_without_a_loss_are_refused() -> None:
    with pytest.raises(RecipeError, match="2 tensors"):
        prune(make(TwoOutputs), [(images(), torch.zeros(6, dtype=torch.int64))], criterion="taylor")


def test_scores_of_weights_need_no_loss() -> None:
    result = prune(make(TwoOutputs), images(), criterion="l1", ratio=3 / 8, round_to=1)
    assert result.plan.kept == {"conv": KEPT}
    assert result.loss is None
