"""Models of timm by name, from its own folders, and from those of TimmWrapper."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.bases import (
    PIXELS,
    TINY,
    WRAPPED,
    assert_same,
    largest_difference,
    output_of,
    put_in_cache,
    refused,
    save_timm,
    save_wrapped,
    seeded_images,
    weights,
)
from helpers.tiny_models import SWIN, VIT
from PIL import Image
from safetensors.torch import load_file, save_file

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.commands.steps.sources import open_source
from isoprune_hf.errors import IsoPruneError, RecipeError
from isoprune_hf.models import load_base

ENCODER = "timm/vit_small_patch14_dinov2"


SMALL = {"img_size": 28, "embed_dim": 32, "depth": 1, "num_heads": 2}


def assert_opens_as_timm_does(folder: Path, tmp_path: Path) -> None:
    base = load_base(str(folder))
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_same(weights(base.model.model), weights(expected))
    assert_same(dict(base.model.model.state_dict()), load_file(folder / "model.safetensors"))
    assert base.model.config.id2label == {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    assert base.model.config.image_size == [3, 16, 16]
    assert base.model.config.base["architecture"] == "vit_tiny_patch16_224"
    assert base.model.config.source["pretrained"] is True
    save_model_folder(tmp_path / "ours", base.model, base.processor)
    again = load_base(str(tmp_path / "ours"))
    images = seeded_images(base)
    assert torch.equal(output_of(again.model, images), output_of(expected, images))


def drop_entries(folder: Path, *names: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))


def test_encoder_gets_the_requested_head(tmp_path: Path) -> None:
    base = load_base(ENCODER, pretrained=False, model_args=SMALL, num_labels=3, label_names=("ant", "bee", "cat"))
    assert base.model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert output_of(base.model, seeded_images(base)).shape == (2, 3)
    source = base.model.config.source
    assert source["num_labels"] == 3
    again = load_base(source["name"], source["pretrained"], model_args=SMALL, num_labels=3, seed=source["seed"])
    assert_same(weights(base.model.model), weights(again.model.model))
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    assert_same(weights(load_base(str(tmp_path / "dense")).model), weights(base.model))


def test_untrained_image_size_needs_no_border() -> None:
    base = load_base("timm/deepseek_vit_412m", pretrained=False, model_args={"img_size": 28, "depth": 1}, num_labels=3)
    pixels = base.processor(Image.new("RGB", (50, 37)), return_tensors="pt").pixel_values
    assert list(pixels.shape[1:]) == base.model.config.image_size == [3, 28, 28]


def test_encoder_without_head_names_num_labels() -> None:
    with pytest.raises(RecipeError, match=r"--prune\.num_labels .*evaluate: --num_labels.*finetune"):
        load_base(ENCODER, pretrained=False, model_args=SMALL)
    with pytest.raises(RecipeError, match=r"prune\.num_labels .*3.* 2 names"):
        load_base(ENCODER, pretrained=False, model_args=SMALL, num_labels=3, label_names=("ant", "bee"))


@pytest.mark.parametrize(
    ("name", "architecture", "args"),
    [
        (TINY, "vit_tiny_patch16_224", VIT),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224", VIT),
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit_tiny_patch16_224", VIT),
        ("timm/swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", SWIN),
        ("timm/resnet10t.c3_in1k", "resnet10t", {}),
    ],
)
def test_timm_name_draws_the_weights_of_timm(name: str, architecture: str, args: dict[str, Any]) -> None:
    base = load_base(name, pretrained=False, model_args=args, seed=11)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        expected = timm.create_model(architecture, pretrained=False, **args).eval()
    assert type(base.model.model) is type(expected)
    assert_same(weights(base.model.model), weights(expected))
    images = torch.randn(2, *(base.model.config.image_size if args else (3, 64, 64)))
    assert torch.equal(output_of(base.model, images), output_of(expected, images))
    assert base.model.config.base["library"] == "timm" and base.model.config.base["args"] == args
    assert base.model.config.base["architecture"].partition(".")[0] == architecture
    place = {"name": name, "pretrained": False, "seed": 11, "model_args": args}
    assert base.model.config.source == {**place, "fingerprint": fingerprint(base.model.model)}
    assert (base.model.config.stage, base.model.config.structure) == ("base", None)
    assert not base.model.training and all(parameter.requires_grad for parameter in base.model.parameters())


def test_timm_folder_opens_with_weights_and_names(tmp_path: Path) -> None:
    assert_opens_as_timm_does(save_timm(tmp_path), tmp_path)


def test_folder_saved_by_timm_opens_alike(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    labels = {"label_names": ["ant", "bee", "cat", "dog"]}
    timm.models.save_for_hf(model, tmp_path / "timm", model_config=labels, safe_serialization=True)
    assert_opens_as_timm_does(tmp_path / "timm", tmp_path)


@pytest.mark.parametrize("changes", [{}, {"crop_mode": "squash"}, {"crop_pct": 1.0, "interpolation": "box"}])
def test_timm_folder_opens_with_its_transform(changes: dict[str, Any], tmp_path: Path) -> None:
    base = load_base(str(save_timm(tmp_path, **changes)))
    data = {"input_size": (3, 16, 16), "crop_mode": "center", **PIXELS, **changes}
    assert largest_difference(base.processor, timm.data.create_transform(**data, is_training=False)) == 0.0


def test_timm_folder_draws_seeded_weights(tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    drawn = load_base(str(folder), pretrained=False, seed=5)
    torch.manual_seed(5)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    assert_same(weights(drawn.model.model), weights(expected))


@pytest.mark.parametrize(
    ("name", "args", "dropped"),
    [
        *((name, args, ()) for name, args in WRAPPED),
        (*WRAPPED[0], ("model_type",)),
        (*WRAPPED[0], ("model_type", "architectures")),
    ],
)
def test_wrapped_folder_opens_with_its_logits(
    name: str, args: dict[str, Any], dropped: tuple[str, ...], tmp_path: Path
) -> None:
    expected = save_wrapped(tmp_path / "wrapped", name, args)
    assert all(key.startswith("timm_model.") for key in load_file(tmp_path / "wrapped" / "model.safetensors"))
    drop_entries(tmp_path / "wrapped", *dropped)
    base = load_base(str(tmp_path / "wrapped"))
    images = seeded_images(base)
    assert torch.equal(output_of(base.model, images), output_of(expected, images))
    assert_same(weights(base.model.model), weights(expected.timm_model))
    assert base.model.config.id2label == {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    assert base.model.config.base == {"library": "timm", "architecture": name, "args": args}
    save_model_folder(tmp_path / "ours", base.model, base.processor)
    again = load_base(str(tmp_path / "ours"))
    assert torch.equal(output_of(again.model, images), output_of(expected, images))


def test_wrapped_folder_with_timm_config_opens(tmp_path: Path) -> None:
    expected = save_wrapped(tmp_path, *WRAPPED[0])
    kept = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "model_args": VIT, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    base = load_base(str(tmp_path))
    assert torch.equal(output_of(base.model, seeded_images(base)), output_of(expected, seeded_images(base)))


def test_wrapped_folder_keeps_transform_and_dtype(tmp_path: Path) -> None:
    data = {"input_size": [3, 16, 16], "crop_mode": "center", **PIXELS}
    model = save_wrapped(tmp_path, *WRAPPED[0], pretrained_cfg=data).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert base.model.dtype == torch.bfloat16
    images = seeded_images(base).to(torch.bfloat16)
    assert torch.equal(output_of(base.model, images), output_of(model, images))
    assert largest_difference(base.processor, timm.data.create_transform(**data, is_training=False)) == 0.0


def test_wrapped_folder_draws_seeded_weights(tmp_path: Path) -> None:
    save_wrapped(tmp_path, *WRAPPED[0])
    drawn = load_base(str(tmp_path), pretrained=False, seed=5)
    torch.manual_seed(5)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    assert_same(weights(drawn.model.model), weights(expected))


def test_wrapped_hub_id_opens_from_cache_offline(offline: Path, tmp_path: Path) -> None:
    expected = save_wrapped(tmp_path / "wrapped", *WRAPPED[0])
    put_in_cache(offline, "someone/wrapped", tmp_path / "wrapped")
    assert_same(weights(load_base("someone/wrapped").model.model), weights(expected.timm_model))


def test_wrapped_folder_without_one_tensor_is_refused(tmp_path: Path) -> None:
    save_wrapped(tmp_path, *WRAPPED[0])
    stored = load_file(tmp_path / "model.safetensors")
    del stored["timm_model.head.bias"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "timm_model.head.bias" in refused(str(tmp_path))


def test_timm_hub_id_opens_from_cache_offline(offline: Path, tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    put_in_cache(offline, "someone/vit", folder)
    base = load_base("someone/vit")
    assert_same(dict(base.model.model.state_dict()), load_file(folder / "model.safetensors"))


def test_unknown_timm_tag_is_refused(offline: Path) -> None:
    assert "resnet50.nosuch_tag" in refused("timm/resnet50.nosuch_tag")


def test_timm_folder_without_head_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    timm.models.save_for_hf(model, tmp_path, model_args=VIT, model_config={"num_classes": 0}, safe_serialization=True)
    message = refused(str(tmp_path))
    assert str(tmp_path) in message and "prune.num_labels" in message


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "samvit_base_patch16", "vit_base_patch16_siglip_224"])
def test_timm_model_without_head_is_refused(name: str) -> None:
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2} | ({"global_attn_indexes": []} if "sam" in name else {})
    message = refused(f"timm/{name}", pretrained=False, model_args=args)
    assert f"timm/{name} is " in message and "prune.num_labels" in message


def test_timm_folder_with_only_pickle_is_refused(tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "contains no model.safetensors" in refused(str(folder))


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("architecture", [None, 5, "nosuch", "hf-hub:someone/model", "local-dir:/etc"])
def test_wrapper_of_no_architecture_is_refused(architecture: Any, pretrained: bool, tmp_path: Path) -> None:
    values = {"model_type": "timm_wrapper", "architecture": architecture, "num_classes": 3, "label_names": [*"abc"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({"timm_model.a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert repr(architecture) in refused(str(tmp_path), IsoPruneError, pretrained=pretrained)


@pytest.mark.parametrize(
    ("changes", "pretrained"),
    [
        ({"architecture": None}, True),
        ({"architecture": 5}, False),
        ({"architecture": "nosuch"}, True),
        ({"architecture": "hf-hub:someone/model"}, False),
        ({"model_args": [1]}, True),
        ({"model_args": {"checkpoint_path": "x.pth"}}, False),
        ({"model_args": {"depth": 10**9}}, True),
        ({"model_args": {"depth": 10**9}}, False),
        ({"num_classes": "x"}, False),
        ({"num_classes": 0}, True),
        ({"num_classes": 3}, False),
        ({"num_classes": 3}, True),
        ({"label_names": ["a"]}, True),
        ({"label_names": ["a", "b", "c", {"d": 1}]}, False),
        ({"label_names": ["a", "b", None, "d"]}, True),
        ({"label_names": 5}, True),
        ({"pretrained_cfg": []}, False),
        ({"pretrained_cfg": 5}, True),
        ({"pretrained_cfg": 5}, False),
        ({"pretrained_cfg": {"input_size": "x"}}, False),
        ({"pretrained_cfg": {"input_size": [3, 16, 16], "interpolation": "nosuch"}}, True),
        ({"pretrained_cfg": {"input_size": [3, 16, 16], "mean": "x"}}, False),
        ({"pretrained_cfg": {"input_size": [3, 16, 16], "std": [0, 0, 0]}}, True),
        ({"pretrained_cfg": {"input_size": [3, 16, 16], "crop_pct": -1}}, False),
        ({"pretrained_cfg": {"input_size": [3, 16, 16], "crop_pct": 1e-9}}, True),
    ],
)
def test_damaged_timm_config_is_refused(changes: dict[str, Any], pretrained: bool, tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(str(folder), IsoPruneError, pretrained=pretrained)


@pytest.fixture
def hub_cache(offline: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The cache of the Hub with two commits of timm/test_resnet.r160_in1k, of which `b...` is the newest."""
    place = offline / "models--timm--test_resnet.r160_in1k"
    weights = {}
    for seed, commit in enumerate(("a" * 40, "b" * 40)):
        torch.manual_seed(seed)
        module = timm.create_model("test_resnet")
        (place / "snapshots" / commit).mkdir(parents=True)
        save_file(module.state_dict(), place / "snapshots" / commit / "model.safetensors")
        weights[commit] = module.fc.weight.detach()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("b" * 40)
    return place, weights


def test_name_of_timm_is_pinned_to_its_commit(hub_cache: tuple[Path, dict[str, torch.Tensor]]) -> None:
    place, weights = hub_cache
    first = load_base("timm/test_resnet")
    assert first.model.config.source["revision"] == "b" * 40
    assert torch.equal(first.model.model.fc.weight, weights["b" * 40])
    (place / "refs" / "main").write_text("a" * 40)
    assert load_base("timm/test_resnet").model.config.source["revision"] == "a" * 40
    again = open_source(first.model)
    assert torch.equal(again.model.model.fc.weight, weights["b" * 40])
    assert again.model.config.source == first.model.config.source
    assert "revision" not in load_base("timm/test_resnet", pretrained=False).model.config.source
