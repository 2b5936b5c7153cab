"""Every kind of network, type, preset and extreme input gives a finite model or one line, never nan.

The full product is under the marker `families`; by default each fault meets one network, type and preset.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers.tiny_models import make_images
from torch import nn

from isoprune_hf import PruneRecipe, load_base, prune_model
from isoprune_hf.checkpoint.finite import describe_not_finite
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import IsoPruneError, RecipeError
from isoprune_hf.pruning import prune as prune_module
from isoprune_hf.pruning.graph.precision import in_float32
from isoprune_hf.pruning.score import score_model

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Fault = Callable[[IsoPruneForImageClassification, Batches], Batches | None]
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8}
MOBILE = {"width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]]}
NETS = {
    "vit": ("timm/vit_tiny_patch16_224", VIT),
    "cnn": ("timm/resnet18", RESNET),
    "depthwise": ("torchvision/mobilenet_v2", MOBILE),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECIPES = {
    "best": {"preset": "best", "target_macs": "60%"},
    "paper": {"preset": "paper", "target_macs": "60%"},
    "reference": {"preset": "reference", "ratio": 0.3},
    "weights": {"criterion": "l1", "target_macs": "60%"},
    "bias": {"criterion": "taylor", "reconstruct": "bias", "target_macs": "60%"},
    "batchnorm": {"criterion": "gate_fisher", "reconstruct": "bn", "target_macs": "60%"},
}


def make_net(name: str, dtype: str = "float32") -> IsoPruneForImageClassification:
    """Build a network of random weights with scales around 1."""
    place, args = NETS[name]
    model = load_base(place, pretrained=False, model_args=args, num_labels=5, seed=0).model
    if name != "vit":
        model.config.image_size = [3, 16, 16]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter, tensor in model.model.state_dict().items():
            if parameter.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                scale = 0.2 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
                if tensor.ndim == 1 and parameter.endswith("weight"):
                    tensor.add_(1)
    return model.to(DTYPES[dtype])


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def norms(model: nn.Module) -> list[nn.Module]:
    return [
        module for module in model.modules() if getattr(module, "weight", None) is not None and module.weight.ndim == 1
    ]


def zero(module: nn.Module, channels: slice = slice(None)) -> None:
    module.weight[channels] = 0
    if module.bias is not None:
        module.bias[channels] = 0


def dead_channels(model: nn.Module, _: Batches) -> None:
    for layer in layers(model)[:-1]:
        zero(layer, slice(0, len(layer.weight) // 2))


def dead_branch(model: nn.Module, _: Batches) -> None:
    zero(layers(model)[-2])


def zero_gammas(model: nn.Module, _: Batches) -> None:
    for norm in norms(model):
        nn.init.zeros_(norm.weight)


def zero_last_gamma(model: nn.Module, _: Batches) -> None:
    nn.init.zeros_(norms(model)[-1].weight)


def huge_layer(model: nn.Module, _: Batches) -> None:
    middle = layers(model)[len(layers(model)) // 2]
    middle.weight.mul_(6e4 / middle.weight.abs().max())


def huge_weight(model: nn.Module, _: Batches) -> None:
    weight = layers(model)[len(layers(model)) // 2].weight
    weight.view(-1)[0] = 0.9 * torch.finfo(weight.dtype).max


def constant_images(_: nn.Module, batches: Batches) -> Batches:
    return [(torch.full_like(images, 0.3), labels) for images, labels in batches]


def one_image(_: nn.Module, batches: Batches) -> Batches:
    return [(images[:1], labels[:1]) for images, labels in batches[:1]]


def one_label(_: nn.Module, batches: Batches) -> Batches:
    return [(images, torch.zeros_like(labels)) for images, labels in batches]


FAULTS: list[Fault] = [
    dead_channels,
    dead_branch,
    zero_gammas,
    zero_last_gamma,
    huge_layer,
    huge_weight,
    constant_images,
    one_image,
    one_label,
]
# The faults that broke something, where they did, and one cell for each of the others.
TRIED = {
    ("vit", "float16", dead_channels, "best"),
    ("depthwise", "bfloat16", dead_branch, "reference"),
    ("cnn", "float32", zero_gammas, "best"),
    ("cnn", "bfloat16", zero_last_gamma, "paper"),
    ("vit", "float16", huge_layer, "weights"),
    ("vit", "float16", huge_layer, "best"),
    ("cnn", "float32", huge_weight, "weights"),
    ("cnn", "float16", constant_images, "batchnorm"),
    ("cnn", "float32", one_image, "batchnorm"),
    ("depthwise", "float32", one_label, "bias"),
}
# Every seventh, which has each pair of a fault with a network, a type and a recipe, is run by `make test-all`.
CELLS = [
    pytest.param(*cell, marks=() if cell in TRIED else pytest.mark.faults if number % 7 else pytest.mark.families)
    for number, cell in enumerate(itertools.product(NETS, DTYPES, FAULTS, RECIPES))
]


@pytest.mark.parametrize(("net", "dtype", "fault", "recipe"), CELLS)
def test_result_is_finite_or_one_line(net: str, dtype: str, fault: Fault, recipe: str) -> None:
    model = make_net(net, dtype)
    images, labels = make_images(model, 12, 3), torch.arange(12) % 5
    batches = list(zip(images.split(6), labels.split(6), strict=True))
    with torch.no_grad():
        batches = fault(model, batches) or batches
    try:
        pruned = prune_model(model, PruneRecipe(round_to=1, **RECIPES[recipe]), batches).model
    except IsoPruneError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert describe_not_finite(pruned.model) is None
    with torch.no_grad():
        assert pruned(make_images(pruned, 4, 9).to(pruned.dtype)).logits.isfinite().all()
        assert pruned(batches[0][0].to(pruned.dtype)).logits.isfinite().all()


def place(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] = value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("recipe", ["best", "weights"])
@pytest.mark.parametrize(
    ("net", "tensor"),
    [
        ("vit", "pos_embed"),
        ("vit", "blocks.0.attn.qkv.weight"),
        ("vit", "norm.bias"),
        ("cnn", "layer4.0.bn2.running_mean"),
        ("depthwise", "classifier.1.weight"),
    ],
)
def test_base_that_is_not_finite_is_named_first(net: str, tensor: str, recipe: str, value: float, monkeypatch) -> None:
    monkeypatch.setattr(prune_module, "_trace", None)  # not reached
    model = make_net(net)
    place(model.model.state_dict()[tensor], value)
    for run in (prune_model, score_model):
        with pytest.raises(RecipeError, match=rf"1 of [\d,]+ values of '{tensor}' are not finite") as caught:
            run(model, PruneRecipe(**RECIPES[recipe]), [])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("net", NETS)
def test_images_not_finite_are_named_before_tracing(net: str, value: float, monkeypatch) -> None:
    model = make_net(net)
    batches = [(make_images(model, 3), torch.arange(3)) for _ in range(2)]
    place(batches[1][0][2], value)
    monkeypatch.setattr(prune_module, "_trace", lambda *_: pytest.fail("traced"))
    with pytest.raises(RecipeError, match="first in image 2 of micro-batch 1"):
        prune_model(model, PruneRecipe(preset="best", target_macs="60%"), batches)


def test_model_that_overflows_stays_in_float32() -> None:
    model = make_net("vit", "float16")
    with torch.no_grad():
        huge_layer(model, [])
    result = prune_model(model, PruneRecipe(round_to=1, **RECIPES["weights"]))
    assert result.model.dtype == torch.float32
    assert [note for note in result.plan.notes if note.startswith("the weights stay in float32: in torch.float16")]
    with torch.no_grad():
        wide = in_float32(model)(make_images(model)).logits
    assert wide.isfinite().all() and not model(make_images(model).half()).logits.isfinite().all()
