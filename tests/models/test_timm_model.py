"""Pruned folders in timm's registry."""

import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import resolve_model_input_args
from timm.models.vision_transformer import VisionTransformer

from isoprune_hf.errors import RecipeError
from isoprune_hf.models import timm_model
from isoprune_hf.models.processors import timm_data, timm_processor


def test_timm_opens_the_pruned_network(pruned) -> None:
    sample = pruned("vit")
    network = timm.create_model("isoprune", folder=str(sample.folder), drop_rate=0.0, num_classes=7).eval()
    assert type(network) is VisionTransformer
    with torch.no_grad():
        assert torch.equal(network(sample.images), sample.logits)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in sample.model.parameters())


def test_new_head_has_the_classes_of_timm(pruned) -> None:
    sample = pruned("vit")
    network = timm.create_model("isoprune", folder=str(sample.folder), num_classes=3).eval()
    with torch.no_grad():
        assert network(sample.images).shape == (2, 3)
        assert torch.equal(network.forward_features(sample.images), sample.model.model.forward_features(sample.images))


SCRIPTS = {
    "validate.py": {"pretrained": True, "num_classes": None, "global_pool": None, "scriptable": False},
    "train.py": {
        "pretrained": False,
        "in_chans": 3,
        "num_classes": 7,
        "drop_rate": 0.0,
        **dict.fromkeys(("drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps")),
        "scriptable": False,
        "checkpoint_path": "",
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_of_scripts_are_accepted(script: str, pruned) -> None:
    sample = pruned("vit")
    wanted = resolve_model_input_args("isoprune", {}, **SCRIPTS[script], folder=str(sample.folder))
    network = timm.create_model(**wanted).eval()
    with torch.no_grad():
        assert torch.equal(network(sample.images), sample.logits)
    assert resolve_data_config({}, model=network)["input_size"] == (3, 16, 16)


def test_transform_of_timm_is_that_of_folder(pruned) -> None:
    sample = pruned("resnet")
    network = timm.create_model("isoprune", folder=str(sample.folder))
    data = resolve_data_config({}, model=network)
    assert data["mean"] == tuple(sample.processor.image_mean)
    first = create_transform(**data).transforms[0]
    assert first.size == sample.processor.size["shortest_edge"]


@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0, 0.9, 0.97])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_data_of_processor_gives_the_processor_back(crop_pct: float, mode: str) -> None:
    data = {"input_size": (3, 224, 224), "crop_pct": crop_pct, "crop_mode": mode, "interpolation": "bicubic"}
    processor = timm_processor({**data, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)})
    again = timm_processor(timm_data(processor))
    assert again.to_dict() == processor.to_dict()


@pytest.mark.parametrize(
    ("family", "options", "setting"),
    [
        ("hf-vit", {}, "folder"),
        ("vit", {"in_chans": 1}, "in_chans"),
        ("vit", {"drop_path_rate": 0.1}, "drop_path_rate"),
    ],
)
def test_what_timm_cannot_open_is_refused(family: str, options: dict, setting: str, pruned) -> None:
    with pytest.raises(RecipeError, match=f"^{setting}: "):
        timm.create_model("isoprune", folder=str(pruned(family).folder), **options)


def test_script_of_timm_runs_with_folder(
    pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = tmp_path / "validate.py"
    script.write_text(
        "import argparse, timm\nfrom timm.utils import ParseKwargs\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--model')\nparser.add_argument('--model-kwargs', nargs='*', action=ParseKwargs)\n"
        "args = parser.parse_args()\nprint(timm.create_model(args.model, **args.model_kwargs).num_classes)\n"
    )
    folder = pruned("vit").folder
    monkeypatch.setattr(
        sys, "argv", [timm_model.__file__, str(script), "--model", "isoprune", "--model-kwargs", f"folder={folder}"]
    )
    runpy.run_path(timm_model.__file__, run_name="__main__")
    assert capsys.readouterr().out.strip() == "7"
