"""A folder opens as the network that was saved: what a config can hold is in it, other changes are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers.bases import assert_same, output_of, seeded_images, weights
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from transformers import PreTrainedModel

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.settings import apply_settings, capture_settings, merge_settings
from isoprune_hf.errors import CheckpointError
from isoprune_hf.models import load_base

RESNET = {"layers": [1, 1, 1, 1], "channels": [64, 8, 8, 8], "stem_width": 8}


class Odd(nn.Module):
    """A network with each kind of attribute, and with modules of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.flag, self.number, self.text, self.sides, self.table = False, 2, "mean", (1, 2), [3]
        self.other, self._hidden = None, 1
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.gate = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        self.drop = nn.Dropout(0.1)


def changed() -> Odd:
    network = Odd()
    network.flag, network.number, network.text, network.sides, network.table = True, 0.5, "max", (3, 4), [5]
    network.other, network._hidden = "x", 7
    network.conv.dilation = (2, 2)
    network.act = nn.LeakyReLU(0.2)
    network.gate = nn.Identity()
    network.drop.p = 0.9
    return network


def test_captured_settings_are_the_differences() -> None:
    plain = {"flag": True, "number": 0.5, "text": "max", "sides": [3, 4], "table": [5], "other": "x"}
    assert capture_settings(Odd(), changed()) == {
        "settings": {"": plain, "conv": {"dilation": [2, 2]}, "act": {"negative_slope": 0.2}},
        "modules": {"act": "LeakyReLU", "gate": "Identity"},
    }
    assert capture_settings(Odd(), Odd()) == {}


def test_applied_settings_give_the_same_network() -> None:
    found = json.loads(json.dumps(capture_settings(Odd(), changed())))
    built = apply_settings(Odd(), found)
    assert capture_settings(built, changed()) == {}
    assert (built.sides, built.table, built.conv.dilation) == ((3, 4), [5], (2, 2))
    assert built.drop.p == 0.1


def test_module_that_is_gone_becomes_none() -> None:
    network = Odd()
    network.gate = None
    found = capture_settings(Odd(), network)
    assert found == {"modules": {"gate": None}}
    assert apply_settings(Odd(), found).gate is None


def test_later_settings_win_over_earlier_ones() -> None:
    base = {"library": "timm", "settings": {"a": {"x": 1, "y": 2}, "b.c": {"z": 3}}, "modules": {"d": None}}
    found = {"settings": {"a": {"x": 9}}, "modules": {"b": "Identity"}}
    assert merge_settings(base, found) == {
        "library": "timm",
        "settings": {"a": {"x": 9, "y": 2}},
        "modules": {"d": None, "b": "Identity"},
    }


@pytest.mark.parametrize(
    "entry",
    [
        {"settings": []},
        {"settings": {"nothing": {"flag": True}}},
        {"settings": {"": {"unknown": True}}},
        {"settings": {"": {"_hidden": 2}}},
        {"settings": {"": {"training": True}}},
        {"settings": {"": {"forward": "x"}}},
        {"settings": {"": {"flag": {"a": 1}}}},
        {"settings": {"": {"number": 2**21}}},
        {"settings": {"": {"text": "a" * 65}}},
        {"settings": {"": {"text": "../x"}}},
        {"settings": {"": [1]}},
        {"modules": {"": "Identity"}},
        {"modules": {"nothing": "Identity"}},
        {"modules": {"act": "Module"}},
        {"modules": {"act": ["ReLU"]}},
        {"modules": "act"},
    ],
)
def test_settings_of_another_network_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.base"):
        apply_settings(Odd(), entry)


# --- the gate


def resnet() -> IsoPruneForImageClassification:
    model = load_base("timm/resnet18", pretrained=False, model_args=RESNET, num_labels=4).model
    model.config.image_size = [3, 32, 32]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
    return model


def change_activation(network: nn.Module) -> None:
    network.layer1[0].act1 = nn.SiLU()


def change_eps(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


def change_dilation(network: nn.Module) -> None:
    network.layer2[0].conv2.dilation = network.layer2[0].conv2.padding = (2, 2)


def change_pooling(network: nn.Module) -> None:
    network.maxpool = nn.AvgPool2d(3, stride=2, padding=1)


def drop_norm(network: nn.Module) -> None:
    network.bn1 = nn.Identity()


@pytest.mark.parametrize(
    "change", [change_activation, change_eps, change_dilation, change_pooling, drop_norm], ids=lambda f: f.__name__
)
def test_changed_network_opens_as_it_was_saved(change: Any, tmp_path: Path) -> None:
    model = resnet()
    plain = model.config.base
    change(model.model)
    images = torch.randn(2, 3, 32, 32)
    expected = output_of(model, images)
    model.save_pretrained(tmp_path)
    again = IsoPruneForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(output_of(again, images), expected)
    assert again.config.base != plain and again.config.format_version == 2


def test_changed_attribute_of_a_cut_is_saved(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    model = IsoPruneForImageClassification.from_pretrained(sample.folder)
    attention = model.model.blocks[0].attn
    attention.scale, attention.fused_attn = 2 * attention.scale, False
    expected = output_of(model, sample.images)
    model.save_pretrained(tmp_path)
    again = IsoPruneForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(output_of(again, sample.images), expected)
    assert not torch.equal(expected, sample.logits)


def add_hook(network: nn.Module) -> None:
    network.layer1.register_forward_hook(lambda module, args, output: output * 2)


def replace_forward(network: nn.Module) -> None:
    network.layer1.forward = lambda x: x * 2


def normalise_weight(network: nn.Module) -> None:
    weight_norm(network.conv1)


def parametrise_weight(network: nn.Module) -> None:
    parametrizations.weight_norm(network.conv1)


def widen_head(network: nn.Module) -> None:
    network.fc = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))


def own_activation(network: nn.Module) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    network.act1 = Half()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (add_hook, "'layer1'"),
        (replace_forward, "'layer1'"),
        (normalise_weight, "conv1.weight"),
        (parametrise_weight, "conv1.parametrizations.weight.original0"),
        (widen_head, "fc.0.bias"),
        (own_activation, "'act1' is Half in memory and ReLU"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_unsavable_change_is_refused_by_name(change: Any, named: str, tmp_path: Path) -> None:
    model = resnet()
    change(model.model)
    with pytest.raises(CheckpointError, match=r"opens? as another network") as caught:
        model.save_pretrained(tmp_path / "folder")
    assert named in str(caught.value)


def test_network_that_never_repeats_itself_is_saved(tmp_path: Path) -> None:
    model = resnet()
    model.model.layer1.register_forward_hook(lambda module, args, output: output + 1e-6 * torch.rand_like(output))
    model.save_pretrained(tmp_path)
    model.model.layer2.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(CheckpointError, match="another network"):
        model.save_pretrained(tmp_path / "changed")


def test_given_state_is_saved_as_it_is(tmp_path: Path) -> None:
    model = resnet()
    add_hook(model.model)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(state))  # transformers empties it
    again = IsoPruneForImageClassification.from_pretrained(tmp_path)
    assert_same(dict(again.state_dict()), state)


@pytest.mark.parametrize("mark", ["hf_quantizer", "_hf_peft_config_loaded"])
def test_quantized_weights_and_adapters_are_not_rebuilt(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resnet()
    add_hook(model.model)
    vars(model)[mark] = True
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *args, **kwargs: None)
    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: None)
    model.save_pretrained("folder")


def test_saving_leaves_modes_hooks_and_draws(tmp_path: Path) -> None:
    model = resnet().train()
    model.model.layer1.eval()
    calls: list[int] = []
    model.model.layer1.register_forward_hook(lambda *_: calls.append(1))
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert len(model.model.layer1._forward_hooks) == 1 and calls


# --- attributes that trained weights bring


def test_settings_of_trained_timm_weights_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = timm.create_model("fbnetc_100", bn_eps=1e-3).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", lambda *_, **__: state)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: state)
    base = load_base("timm/fbnetc_100")
    assert base.model.config.base["settings"]["bn1"] == {"eps": 1e-3}
    base.model.save_pretrained(tmp_path)
    again = IsoPruneForImageClassification.from_pretrained(tmp_path)
    images = seeded_images(base)
    assert torch.equal(output_of(again, images), output_of(base.model, images))


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("googlenet", 64, {"aux_logits": False, "transform_input": True}),
        pytest.param("inception_v3", 96, {"transform_input": True}, marks=pytest.mark.families),
    ],
)
def test_arguments_of_trained_torchvision_weights_are_saved(
    name: str, size: int, args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = torchvision.models.get_model(name, weights=None, init_weights=False).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: state)
    base = load_base(f"torchvision/{name}")
    assert base.model.config.base["args"] == args
    base.model.config.image_size = [3, size, size]
    base.model.save_pretrained(tmp_path)
    again = IsoPruneForImageClassification.from_pretrained(tmp_path)
    assert_same(weights(again), weights(base.model))
    images = torch.randn(1, 3, size, size)
    assert torch.equal(output_of(again, images), output_of(base.model, images))


class Tiny(torchvision.models.VisionTransformer):
    """The constructor of torchvision's ViT-B/16, with smaller layers."""

    def __init__(self, image_size: int, num_layers: int, num_heads: int, hidden_dim: int, **options: Any) -> None:
        super().__init__(image_size, num_layers=1, num_heads=2, hidden_dim=8, **{**options, "mlp_dim": 8})


def test_image_size_of_torchvision_weights_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models.vision_transformer.VisionTransformer", Tiny)
    state = torchvision.models.vit_b_16(image_size=384).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: state)
    base = load_base("torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1")
    assert base.model.config.base["args"] == {"image_size": 384}
    assert_same(weights(base.model.model), state)
