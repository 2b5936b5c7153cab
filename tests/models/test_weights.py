"""Weights of a file that a training wrote become those of a base, or are refused with what does not fit."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers.bases import CLASSES, assert_same, output_of, save_timm, seeded_images, weights
from helpers.tiny_models import TRANSFORMERS, VIT
from safetensors.torch import save_file
from timm.models import load_checkpoint
from torch import nn
from transformers import ViTImageProcessor

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.models.weights import fit_names, head_size

TIMM = "timm/vit_tiny_patch16_224"
Write = Callable[[Any, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(content: Any, name: str = "weights.pth") -> Path:
        path = tmp_path / name
        (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
        return path

    return save


def trained(labels: int = 5) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=labels, **VIT).eval()


def opened(file: Path, **options: Any) -> BaseModel:
    return load_base(TIMM, model_args=VIT, weights=file, **options)


def refusal(file: Path, name: str = TIMM, **options: Any) -> str:
    with pytest.raises(RecipeError, match=r"prune\.weights") as caught:
        load_base(name, weights=file, **options)
    return str(caught.value)


# --- what a file may look like


def in_module(state: dict[str, Any]) -> Any:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def in_lightning(state: dict[str, Any]) -> Any:
    inner = {f"net.encoder._orig_mod.{name}": tensor for name, tensor in state.items()}
    return {"state_dict": {**inner, "loss.weight": torch.ones(2)}, "hyper_parameters": {"lr": 0.1}, "epoch": 3}


def in_checkpoint(state: dict[str, Any]) -> Any:
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {"model": wrong, "model_ema": {"module": state}, "args": argparse.Namespace(lr=0.1), "optimizer": {}}


def in_average(state: dict[str, Any]) -> Any:
    return {"n_averaged": torch.tensor(4), **in_module(state)}


@pytest.mark.parametrize("wrap", [dict, in_module, in_lightning, in_checkpoint, in_average])
def test_file_gives_the_logits_of_timm(wrap: Callable[[Any], Any], write: Write) -> None:
    file = write(wrap(trained().state_dict()))
    base = opened(file)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT).eval()
    if wrap in (dict, in_module):  # prefixes that timm removes as well
        load_checkpoint(expected, str(file))
    else:
        expected.load_state_dict(trained().state_dict())
    images = seeded_images(base)
    assert torch.equal(output_of(base.model, images), output_of(expected, images))
    assert base.model.config.num_labels == 5


def test_safetensors_of_torchvision_open(write: Write) -> None:
    torch.manual_seed(3)
    network = torchvision.models.mobilenet_v2(num_classes=3, width_mult=0.25).eval()
    file = write({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, "w.safetensors")
    base = load_base("torchvision/mobilenet_v2", model_args={"width_mult": 0.25}, weights=file)
    assert_same(weights(base.model.model), weights(network))
    assert base.model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


@pytest.mark.parametrize("is_saved", [True, False])
def test_weights_of_transformers_open_by_both_names(is_saved: bool, write: Write, tmp_path: Path) -> None:
    TRANSFORMERS["hf-vit"].save_pretrained(tmp_path / "config")
    config = TRANSFORMERS["hf-vit"].from_pretrained(tmp_path / "config", num_labels=4)
    torch.manual_seed(3)
    network = CLASSES["hf-vit"](config).eval()
    network.save_pretrained(tmp_path / "trained")
    file = tmp_path / "trained" / "model.safetensors" if is_saved else write(network.state_dict())
    base = load_base(str(tmp_path / "config"), weights=file)
    assert_same(weights(base.model.model), weights(network))
    assert base.model.config.num_labels == 4


def test_source_names_the_file_absolutely(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(trained().state_dict())
    monkeypatch.chdir(file.parent)
    model = opened(Path(file.name)).model
    place = {"name": TIMM, "pretrained": True, "seed": 0, "model_args": VIT, "weights": str(file)}
    assert model.config.source == {**place, "fingerprint": fingerprint(model.model)}


def test_half_precision_of_a_file_is_kept(write: Write) -> None:
    assert opened(write(trained().to(torch.bfloat16).state_dict())).model.dtype == torch.bfloat16


def test_counters_that_a_file_lacks_are_zero(write: Write) -> None:
    network = timm.create_model("resnet18", num_classes=3)
    state = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    base = load_base("timm/resnet18", weights=write(state))
    assert base.model.model.bn1.num_batches_tracked == 0
    assert torch.equal(base.model.model.fc.weight, network.fc.weight)


def test_new_head_replaces_the_one_in_file(write: Write) -> None:
    base = opened(write(trained().state_dict()), num_labels=2)
    assert base.model.config.num_labels == 2 and base.model.config.source["num_labels"] == 2
    assert torch.equal(base.model.model.cls_token, trained().cls_token)


def test_label_names_of_file_size_are_taken(write: Write) -> None:
    names = ("a", "b", "c", "d", "e")
    base = opened(write(trained().state_dict()), num_labels=5, label_names=names)
    assert tuple(base.model.config.id2label.values()) == names
    assert_same(weights(base.model.model), weights(trained()))


@pytest.mark.parametrize("is_timm", [True, False])
def test_transform_of_the_folder_is_taken(is_timm: bool, tmp_path: Path) -> None:
    if is_timm:
        folder = save_timm(tmp_path, mean=(0.5, 0.5, 0.5), crop_pct=1.0)
    else:
        folder = tmp_path
        save_file(trained().state_dict(), folder / "model.safetensors")
        ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3).save_pretrained(folder)
    processor = opened(folder / "model.safetensors").processor
    assert list(processor.image_mean) == [0.5] * 3
    assert dict(processor.size) == ({"shortest_edge": 16} if is_timm else {"height": 16, "width": 16})


# --- what is refused


def test_other_architecture_is_refused_by_names(write: Write) -> None:
    state = trained().state_dict()
    del state["cls_token"]
    state["odd"] = torch.ones(1)
    state["norm.bias"] = torch.ones(3)
    message = refusal(write(state), model_args=VIT)
    assert "1 missing (cls_token); 1 surplus (odd); 1 of another shape (norm.bias [3], not [32])" in message


@pytest.mark.parametrize("content", [{"epoch": 1}, {"model": {"lr": 0.1}}, [1], torch.ones(2)])
def test_file_without_state_dict_is_refused(content: Any, write: Write) -> None:
    assert "no state dict" in refusal(write(content), model_args=VIT)


def test_pickled_module_is_sent_to_convert(write: Write) -> None:
    file = write(trained())
    assert f"isoprune convert {file}" in refusal(file, model_args=VIT)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_weights_are_refused(name: str, write: Write) -> None:
    file = write(trained().state_dict(), name)
    file.write_bytes(file.read_bytes()[:1000])
    assert "damaged" in refusal(file, model_args=VIT)


def test_weights_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.pth", model_args=VIT)


def test_weights_contradict_random_ones(write: Write) -> None:
    assert "pretrained" in refusal(write(trained().state_dict()), pretrained=False, model_args=VIT)


# --- values by hand


def test_prefix_is_that_of_most_names() -> None:
    one = torch.ones(1)
    fitted = fit_names({"a.x.weight": one, "a.bias": one, "a.x.bias": one, "b": one}, {"weight", "bias"})
    assert (sorted(fitted.tensors), fitted.prefix, fitted.left_out) == (["bias", "weight"], "a.x.", ("a.bias", "b"))


@pytest.mark.parametrize(
    ("shapes", "count"),
    [
        ({"head": (5, 4)}, 5),
        ({"head": (7, 4)}, None),
        ({"head": (5, 3)}, None),
        ({"head": (5, 4), "aux": (6, 4)}, None),
    ],
)
def test_head_size_is_one_number(shapes: dict[str, tuple[int, ...]], count: int | None) -> None:
    layout = {"head": torch.empty(7, 4), "aux": torch.empty(7, 4), "stem": torch.empty(3, 4)}
    assert head_size({name: torch.empty(shape) for name, shape in shapes.items()}, layout, 7) == count
