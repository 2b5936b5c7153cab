"""A pruned module is saved as a folder that computes the same, or is refused with the ways to save it."""

import copy
import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers.own_nets import OwnNet, TwoInputs, make_own
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from isoprune_hf import IsoPruneConfig, IsoPruneForImageClassification, Pruned, load_base, prune
from isoprune_hf.api.holding import inner_of
from isoprune_hf.api.program import save_program
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models.calling import CallForm
from isoprune_hf.pruning.plan import PruningPlan

VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_wrapper() -> nn.Module:
    config = TimmWrapperConfig(architecture="test_resnet", id2label={0: "cat", 1: "dog", 2: "owl"})
    return TimmWrapperForImageClassification(config)


def make_vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**VIT, intermediate_size=64, id2label={0: "cat", 1: "dog", 2: "owl"}))


# Name -> how a caller makes the module, and the size of its images.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm": (lambda: timm.create_model("test_resnet", num_classes=3), (3, 32, 32)),
    "timm of four channels": (lambda: timm.create_model("test_resnet", num_classes=3, in_chans=4), (4, 32, 32)),
    "timm of another size": (lambda: timm.create_model("test_vit", num_classes=3, img_size=64), (3, 64, 64)),
    "TimmWrapper": (make_wrapper, (3, 32, 32)),
    "torchvision": (lambda: torchvision.models.squeezenet1_1(num_classes=3), (3, 32, 32)),
    "transformers": (make_vit, (3, 16, 16)),
}


def cut(module: nn.Module, size: tuple[int, ...], **settings: Any) -> Pruned:
    return prune(module, torch.zeros(1, *size), criterion="l1", ratio=0.5, round_to=2, **settings)


def logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("kind", MODULES)
def test_module_of_a_library_is_saved(kind: str, tmp_path: Path) -> None:
    make, size = MODULES[kind]
    torch.manual_seed(0)
    module = make()
    result = cut(module, size)
    assert type(result.model) is type(module)
    result.save(tmp_path / "half")
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "half")
    images = torch.randn(2, *size)
    with torch.no_grad():
        assert torch.equal(opened(images).logits, logits(result.model(images)))
    assert type(opened.model) is type(inner_of(module))
    assert not (tmp_path / "half" / "preprocessor_config.json").exists()  # that of the weights makes other images
    assert "isoprune" in (tmp_path / "half" / "README.md").read_text(encoding="utf-8")


def test_encoder_of_a_library_is_pruned() -> None:
    module = timm.create_model("test_resnet", features_only=True).eval()
    result = cut(module, (3, 32, 32))
    expected = [value.shape for value in module(torch.zeros(1, 3, 32, 32))]
    assert [value.shape for value in result.model(torch.zeros(1, 3, 32, 32))] == expected


def test_labels_and_processor_of_base_are_saved(tmp_path: Path) -> None:
    cut(make_vit(), (3, 16, 16)).save(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    cut(timm.create_model("test_resnet"), (3, 160, 160)).save(tmp_path / "timm")
    processor = json.loads((tmp_path / "timm" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert processor["crop_size"] == {"height": 160, "width": 160}


def test_weights_of_now_are_saved(tmp_path: Path) -> None:
    result = cut(make_vit(), (3, 16, 16))
    with torch.no_grad():
        result.model.classifier.bias.fill_(3)
    result.save(tmp_path)
    opened = IsoPruneForImageClassification.from_pretrained(tmp_path)
    assert opened.model.classifier.bias.tolist() == [3, 3, 3]


def test_name_and_opened_model_give_our_class(tmp_path: Path) -> None:
    settings = {"criterion": "l1", "ratio": 0.5, "round_to": 2}
    named = prune("timm/test_resnet", torch.zeros(1, 3, 160, 160), pretrained=False, **settings)
    opened = prune(load_base("timm/test_resnet", pretrained=False).model, torch.zeros(1, 3, 160, 160), **settings)
    assert type(named.model) is type(opened.model) is IsoPruneForImageClassification
    assert named.plan.kept == opened.plan.kept
    named.save(tmp_path)
    twice = prune(tmp_path, torch.zeros(1, 3, 160, 160), **settings)
    assert twice.pruned_cost.macs < named.pruned_cost.macs
    assert twice.config.cost["base"] == named.base_cost.to_dict()


def test_own_class_is_saved_with_its_arguments(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = cut(OwnNet(8), (5,))
    result.save(tmp_path, builder=OwnNet, arguments={"width": 8})
    opened = IsoPruneForImageClassification.from_pretrained(tmp_path)
    assert type(opened.model) is OwnNet
    assert opened.model.hidden.out_features == 4
    with pytest.raises(CheckpointError, match="num_labels"):
        IsoPruneForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    inputs = torch.randn(3, 5)
    assert torch.equal(opened(inputs).logits, result.model(inputs))


def test_builder_may_be_a_function(tmp_path: Path) -> None:
    result = cut(make_own(num_classes=3), (5,))
    result.save(tmp_path, builder=make_own, arguments={"num_classes": 3})
    opened = AutoModelForImageClassification.from_pretrained(tmp_path, builder=make_own)
    inputs = torch.randn(3, 5)
    assert torch.equal(opened(inputs).logits, result.model(inputs))
    other = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert torch.equal(other.model.hidden.weight, result.model.hidden.weight) and other.model.head.out_features == 7


def test_result_is_pruned_further_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = cut(OwnNet(16), (5,))
    second = cut(copy.deepcopy(first), (5,))
    assert second.model.hidden.out_features == 4 and second.base is not first.model
    assert second.config.cost["base"] == first.base_cost.to_dict()
    second.save(tmp_path, builder=OwnNet, arguments={"width": 16})
    opened, inputs = IsoPruneForImageClassification.from_pretrained(tmp_path, builder=OwnNet), torch.randn(3, 5)
    assert torch.equal(opened(inputs).logits, second.model(inputs))


def test_several_inputs_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = {"image": torch.randn(2, 3, 4, 5), "extra": torch.randn(2, 6)}
    result = prune(TwoInputs(8), [batch], inputs=["image", "extra"], criterion="l1", ratio=0.5, round_to=2)
    result.save(tmp_path, builder=TwoInputs, arguments={"width": 8})
    opened = IsoPruneForImageClassification.from_pretrained(tmp_path, builder=TwoInputs)
    assert torch.equal(opened.model(**batch)["logits"], result.model(**batch)["logits"])
    assert torch.equal(opened(batch["image"], extra=batch["extra"]).logits, result.model(**batch)["logits"])
    with torch.no_grad():
        result.model.side.bias.fill_(9)
    result.model.side.forward = lambda extra: extra.new_zeros(len(extra), result.model.head.out_features)
    with pytest.raises(CheckpointError, match="side"):
        result.save(tmp_path / "other", builder=TwoInputs, arguments={"width": 8})


@pytest.mark.parametrize("inputs", [[], [["image", [0]]], [[3, [2]]], [["a b", [2]]], [[None, [2**20, 2**20]]], 5])
def test_damaged_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(CheckpointError, match="inputs"):
        IsoPruneConfig(base={"library": "python", "architecture": "a:b", "inputs": inputs}, image_size=[5])


@pytest.mark.parametrize("architecture", ["helpers.own_nets:OwnNet", "os:system", "torch.nn:Identity", "torch", None])
def test_nothing_is_built_by_its_name(
    architecture: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(OwnNet(8), (5,)).save(tmp_path, builder=OwnNet, arguments={"width": 8})
    monkeypatch.setattr("isoprune_hf.checkpoint.own_network._BUILDERS", {})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base"] = {"library": "python", "architecture": architecture, "args": {}}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="architecture"):
        IsoPruneForImageClassification.from_pretrained(tmp_path)


class LocalNet(OwnNet):
    """Not the class that `builder` names."""


@pytest.mark.parametrize(
    ("builder", "arguments", "error"),
    [
        (LocalNet, {"width": 8}, RecipeError),
        (lambda: OwnNet(8), None, RecipeError),
        (partial(OwnNet, 8), None, RecipeError),
        (make_own, {"width": 8, "num_classes": 7}, RecipeError),
        (torch.nn.functional.relu, {}, CheckpointError),
        (OwnNet, {"width": torch.tensor(8)}, CheckpointError),
        (OwnNet, {"width": 4}, RecipeError),
        (OwnNet, None, CheckpointError),
    ],
)
def test_unusable_builder_is_refused(builder: Any, arguments: Any, error: type[Exception], tmp_path: Path) -> None:
    result = cut(OwnNet(8), (5,))
    with pytest.raises(error):
        result.save(tmp_path / "own", builder=builder, arguments=arguments)
    assert not (tmp_path / "own").exists()


def test_class_inside_a_function_is_refused(tmp_path: Path) -> None:
    class Inner(OwnNet):
        pass

    with pytest.raises(RecipeError, match="Inner"):
        cut(Inner(8), (5,)).save(tmp_path / "own", builder=Inner, arguments={"width": 8})


def test_module_of_unknown_class_becomes_a_program(tmp_path: Path) -> None:
    class Inner(TwoInputs):
        pass

    torch.manual_seed(0)
    batch = {"image": torch.randn(2, 3, 4, 5), "extra": torch.randn(2, 6)}
    result = prune(Inner(8), [batch], inputs=["image", "extra"], criterion="l1", ratio=0.5, round_to=2)
    with torch.no_grad():
        result.model.side.bias[0] = 1 + 2**-16  # begins with the byte 0x80, as a pickle does
    result.save(tmp_path / "half")
    opened = torch.export.load(tmp_path / "half" / "model.pt2").module()
    larger = {name: torch.randn(5, *value.shape[1:]) for name, value in batch.items()}
    assert torch.allclose(opened(**larger)["logits"], result.model(**larger)["logits"], atol=1e-6)
    assert not (tmp_path / "half" / "config.json").exists()
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in result.model.state_dict().items())
    assert "torch.export" in (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "half" / "model.pt2") as archive:
        texts = [archive.read(name) for name in archive.namelist() if name.endswith("config.json")]
        assert texts and not any(b'"use_pickle": true' in text for text in texts)
        assert [archive.read(name) for name in archive.namelist() if "sample_inputs" in name] == [b""]
    with pytest.raises(ValueError, match="config"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "half")


class Marked(torch.Tensor):
    """Tensors that torch.export would write as pickles."""


def test_program_with_a_pickle_is_refused(tmp_path: Path) -> None:
    class Inner(OwnNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.mark

    net = Inner(8)
    net.register_buffer("mark", torch.ones(4).as_subclass(Marked))
    with pytest.raises(CheckpointError, match="a pickle"):
        save_program(tmp_path / "own", net, CallForm((None,), (torch.Size([5]),)), PruningPlan({}, {}))
    assert not (tmp_path / "own").exists()


def test_module_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    class Dynamic(OwnNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if float(x.sum()) > 1e9 else x + 1)

    with pytest.raises(CheckpointError, match="builder"):
        cut(Dynamic(8), (5,)).save(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_module_that_config_cannot_describe_is_refused(tmp_path: Path) -> None:
    module = timm.create_model("test_resnet", num_classes=3)
    module.forward_head = lambda hidden: module.fc(hidden.amax((2, 3)))  # of this one instance
    with pytest.raises(CheckpointError):
        cut(module, (3, 64, 64)).save(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_uniform_layout_gives_a_stock_model(tmp_path: Path) -> None:
    result = cut(make_vit(), (3, 16, 16), layout="uniform")
    result.save(tmp_path)
    opened, images = ViTForImageClassification.from_pretrained(tmp_path), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(opened(images).logits, logits(result.model(images)))


def test_changed_epsilon_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=3)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.1
    result, images = cut(module, (3, 32, 32)), torch.randn(2, 3, 32, 32)
    result.save(tmp_path)
    opened = IsoPruneForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(opened(images).logits, result.model(images))
