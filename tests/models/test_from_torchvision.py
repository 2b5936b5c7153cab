"""Models of torchvision."""

from pathlib import Path

import pytest
import torch
import torchvision
from helpers.bases import assert_same, refused, weights

from isoprune_hf.checkpoint.dense import build_base
from isoprune_hf.models import load_base
from isoprune_hf.models.from_module import recognise


def test_torchvision_name_draws_the_weights_of_torchvision() -> None:
    base = load_base("torchvision/mobilenet_v2", pretrained=False, model_args={"width_mult": 0.25}, seed=6)
    torch.manual_seed(6)
    expected = torchvision.models.mobilenet_v2(weights=None, width_mult=0.25)
    assert_same(weights(base.model.model), weights(expected))
    assert base.model.config.base == {
        "library": "torchvision",
        "architecture": "mobilenet_v2",
        "args": {"width_mult": 0.25},
    }
    assert base.model.config.image_size == [3, 224, 224]


def test_published_weights_of_torchvision_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(1)
    published = torchvision.models.squeezenet1_1(weights=None)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = Path(torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url).name
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    for name in ("torchvision/squeezenet1_1", "torchvision/squeezenet1_1.IMAGENET1K_V1"):
        base = load_base(name)
        assert_same(weights(base.model.model), weights(published))
        assert base.model.config.source["pretrained"] is True


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_small", "r3d_18"])
def test_torchvision_model_of_another_task_is_refused(name: str) -> None:
    message = refused(f"torchvision/{name}", pretrained=False)
    assert f"torchvision/{name}" in message and "not an image classifier" in message


def test_unknown_torchvision_weights_list_known_ones() -> None:
    message = refused("torchvision/resnet50.IMAGENET1K_V9")
    assert "'IMAGENET1K_V9'" in message and "IMAGENET1K_V1, IMAGENET1K_V2" in message


CHANGED = {
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "vit_b_16": {"image_size": 32},
}


@pytest.mark.parametrize("name", CHANGED)
def test_module_with_other_arguments_is_recognised(name: str) -> None:
    with torch.device("meta"):
        module = torchvision.models.get_model(name, num_classes=3, **CHANGED[name])
    found = recognise(module, [3, 32, 32])
    assert found is not None and found.config.base["architecture"] == name
    with torch.device("meta"):
        built = build_base(found.config)
    assert {n: t.shape for n, t in built.state_dict().items()} == {n: t.shape for n, t in module.state_dict().items()}
