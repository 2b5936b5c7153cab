from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.plain_scores import assert_near, batches_of, gradients_of_images
from helpers.tiny_models import FAMILIES, make_base
from torch import nn
from torch.nn import functional

from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.scoring.criteria.reference import last_squared_gradient
from isoprune_hf.pruning.scoring.fisher import Ways, choose_ways, mean_squared_gradients
from isoprune_hf.pruning.scoring.per_sample_gradients import looped_squares, streamed_squares, vmapped_squares


class Classifier(nn.Module):
    """A network with the interface of the package's models; images are (3, 8, 8)."""

    device = torch.device("cpu")

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(image_size=(3, 8, 8), problem_type=None)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("running_var"):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                elif tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(pixel_values))


def mean_of_squares(model: nn.Module, batches) -> dict[str, torch.Tensor]:
    squares = [{name: g.double() ** 2 for name, g in each.items()} for each in gradients_of_images(model, batches)]
    return {name: sum(square[name] for square in squares) / len(squares) for name in squares[0]}


def assert_exact(model: nn.Module, names=None, sizes=(4, 1, 3)) -> None:
    batches = batches_of(model, list(sizes))
    expected = mean_of_squares(model, batches)
    names = names or list(expected)
    found = mean_squared_gradients(model, names, Calibration(batches))
    assert set(found) == set(names)
    # The gradient of a key's bias is zero but for rounding, because softmax does not see it.
    floor = 1e-12 * max(square.max().item() for square in expected.values())
    for name in names:
        assert found[name].shape == expected[name].shape
        assert_near(found[name], expected[name], 1e-5, floor, name)


def ways_of(model: nn.Module) -> Ways:
    names = [name for name, _ in model.model.named_parameters()]
    with scoring_mode(model, requires_grad=False):
        return choose_ways(model, names, tuple(model.config.image_size), torch.tensor([0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_a_loop_over_images(family: str, tmp_path: Path) -> None:
    assert_exact(make_base(family, tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_suffices_except_for_transformers_swin_tables(family: str, tmp_path: Path) -> None:
    ways = ways_of(make_base(family, tmp_path))
    assert not ways.looped
    assert all(name.endswith("relative_position_bias_table") for name in ways.vmapped)
    assert len(ways.vmapped) == (4 if family == "hf-swin" else 0)


LAYERS = {
    "1x1": lambda: nn.Conv2d(3, 4, 1),
    "1x1 with stride": lambda: nn.Conv2d(3, 4, 1, stride=2),
    "1x1 with padding": lambda: nn.Conv2d(3, 4, 1, padding=1, bias=False),
    "3x3": lambda: nn.Conv2d(3, 4, 3, stride=(2, 1), padding=(1, 2)),
    "dilated": lambda: nn.Conv2d(3, 4, (3, 2), dilation=2, padding=1),
    "depthwise": lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3),
    "depthwise with two filters each": lambda: nn.Conv2d(3, 6, 3, stride=2, groups=3),
    "padding by name": lambda: nn.Conv2d(3, 4, 3, padding="same"),
    "reflected padding": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2),
    "batch norm": lambda: nn.BatchNorm2d(3),
    "group norm": lambda: nn.GroupNorm(3, 3),
    "layer norm over three dims": lambda: nn.LayerNorm([3, 8, 8]),
    "layer norm": lambda: nn.LayerNorm(8),
    "PReLU": lambda: nn.PReLU(3),
    "linear over a dim": lambda: nn.Linear(8, 5),
    "two convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3, groups=2)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_type_is_exact_in_one_pass(kind: str) -> None:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(7))
    net = nn.Sequential(LAYERS[kind](), head)
    net(torch.zeros(1, 3, 8, 8))
    model = Classifier(net)
    ways = ways_of(model)
    assert not ways.vmapped and not ways.looped
    assert_exact(model)


class Twice(nn.Module):
    """A network that calls a layer twice and ties a weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.tied, self.head = (nn.Linear(n, m) for n, m in ((192, 6), (6, 6), (6, 6), (6, 7)))
        self.tied.weight = self.shared.weight
        self.big = nn.Linear(192, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images.flatten(1)) * self.big(images.flatten(1))
        return self.head(self.tied(self.shared(self.shared(hidden).tanh()).tanh()))


class Functional(nn.Module):
    """A network that uses a weight without calling its layer, and has samples on dim 1."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.hidden, self.head = (
            nn.Linear(n, m) for n, m in ((24, 60), (60, 6), (6, 6), (6, 7))
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(images.reshape(len(images), 8, 24))
        hidden = self.mix(hidden.transpose(0, 1)).tanh()  # (tokens, B, C)
        return self.head(functional.linear(hidden, self.hidden.weight, self.hidden.bias).tanh().mean(0))


class Tokens(nn.Module):
    """A network with a token that must be (1, C), one that need not, a scale, and a parameter that it never uses."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(1, 6))
        self.token = nn.Parameter(torch.zeros(1, 6))
        self.scale = nn.Parameter(torch.zeros(6))
        self.idle = nn.Parameter(torch.zeros(1, 3))
        self.embed, self.head = nn.Linear(192, 6), nn.Linear(6, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(images.flatten(1)) + self.wide
        return self.head((hidden + self.token.reshape(6)).tanh() * self.scale)


class Untraceable(nn.Module):
    """A network that branches on the value of an activation, which torch.func refuses."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(192, 6), nn.Linear(6, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(images.flatten(1)).tanh()
        return self.head(self.head.weight.sum(0) + (hidden if hidden.abs().max().item() < 2 else -hidden))


def test_layer_called_twice_or_tied_uses_vmap() -> None:
    model = Classifier(Twice())
    ways = ways_of(model)
    assert set(ways.vmapped) == {"shared.weight", "shared.bias"} and not ways.looped
    assert_exact(model)


def test_parameters_wrong_in_the_probe_use_vmap() -> None:
    model = Classifier(Functional())
    assert set(ways_of(model).vmapped) == {"mix.weight", "mix.bias", "hidden.weight", "hidden.bias"}
    assert_exact(model)


def test_tokens_that_cannot_be_expanded_use_vmap() -> None:
    model = Classifier(Tokens())
    ways = ways_of(model)
    assert set(ways.layers) == {"embed", "head"}
    assert {"wide", "token", "scale"} <= set(ways.vmapped)
    assert_exact(model)


def test_model_that_vmap_refuses_uses_the_loop() -> None:
    model = Classifier(Untraceable())
    ways = ways_of(model)
    assert set(ways.looped) == {"head.weight"} and not ways.vmapped
    assert_exact(model)


def test_vmap_for_most_elements_means_vmap_for_all() -> None:
    net = Functional()
    net.mix, net.embed = nn.Linear(24, 6), nn.Identity()
    ways = ways_of(Classifier(net))
    assert not ways.layers and set(ways.vmapped) == {name for name, _ in net.named_parameters()}
    assert_exact(Classifier(net))


def test_the_three_ways_agree(tmp_path: Path) -> None:
    model = make_base("swin", tmp_path)
    ways = ways_of(model)
    names = [f"{path}.{leaf}" for path, leaves in ways.layers.items() for leaf in leaves]
    [(images, labels)] = batches_of(model, [3])
    with scoring_mode(model, requires_grad=False):
        streamed = streamed_squares(model, ways.layers, ways.expanded, images, labels)
        others = [way(model, names, images, labels) for way in (vmapped_squares, looped_squares)]
    for name in names:
        for other in others:
            assert_near(streamed[name], other[name], 1e-5, 1e-10, name)


def test_hessian_reference_uses_only_the_last_image(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    batches = batches_of(model, [3, 2])
    last = list(gradients_of_images(model, batches))[-1]
    found = last_squared_gradient(model, list(last), Calibration(batches))
    for name, gradient in last.items():
        assert_near(found[name], gradient**2, 1e-5, 0.0, name)


def test_error_in_forward_pass_leaves_no_hook(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    batches = [*batches_of(model, [2]), (torch.zeros(2, 3, 5, 5), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(AssertionError, match="Input height"):
        mean_squared_gradients(model, ["blocks.0.mlp.fc1.weight"], Calibration(batches))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
