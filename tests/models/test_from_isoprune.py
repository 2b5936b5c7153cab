"""Dense and pruned folders of isoprune_hf as bases."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from helpers.bases import (
    assert_same,
    copy_of,
    output_of,
    put_in_cache,
    refused,
    seeded_images,
    tiny,
    weights,
)
from helpers.tiny_models import VIT

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor, IsoPruneForImageClassification
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.models import load_base


def test_dense_folder_opens_again(tmp_path: Path) -> None:
    base = tiny(num_labels=3, label_names=("cat", "dog", "owl"), seed=5)
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    again = load_base(str(tmp_path / "dense"))
    images = seeded_images(base)
    assert torch.equal(output_of(again.model, images), output_of(base.model, images))
    assert again.model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert again.model.config.source == base.model.config.source
    assert type(again.processor) is IsoImageProcessor and again.processor.to_dict() == base.processor.to_dict()


@pytest.mark.parametrize("family", ["vit", "resnet", "hf-vit"])
def test_pruned_folder_opens_with_its_logits(family: str, pruned) -> None:
    sample = pruned(family)
    for labels in (None, 7):
        base = load_base(str(sample.folder), num_labels=labels)
        assert torch.equal(output_of(base.model, sample.images), sample.logits)
        assert base.model.config.stage == "pruned"
        assert base.model.config.structure == sample.model.config.structure
    assert type(base.processor) is type(sample.processor)


def test_dense_folder_takes_a_new_head(tmp_path: Path) -> None:
    base = tiny(num_labels=3, seed=5)
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    headed = load_base(str(tmp_path / "dense"), num_labels=6, label_names=tuple("abcdef"))
    assert headed.model.config.num_labels == 6 and headed.model.config.id2label[5] == "f"
    head = {"model.head.weight", "model.head.bias"}
    parts = (weights(base.model), weights(headed.model))
    assert_same(*({k: v for k, v in part.items() if k not in head} for part in parts))


def test_pruned_folder_takes_a_new_head(pruned) -> None:
    sample = pruned("vit")
    headed = load_base(str(sample.folder), num_labels=3)
    assert output_of(headed.model, sample.images).shape == (2, 3)
    with torch.no_grad():
        features = (found.model.model.forward_features(sample.images) for found in (headed, sample))
        assert torch.equal(*features)
    assert headed.model.config.structure["shapes"]["head.weight"][0] == 3


def test_dense_folder_draws_seeded_weights(tmp_path: Path) -> None:
    base = tiny(num_labels=3, label_names=("cat", "dog", "owl"), seed=5)
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    drawn, again = (load_base(str(tmp_path / "dense"), pretrained=False, seed=6).model for _ in range(2))
    assert_same(weights(drawn), weights(again))
    torch.manual_seed(6)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT)
    assert_same(weights(drawn.model), weights(expected))
    assert drawn.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert (drawn.config.source["pretrained"], drawn.config.source["seed"]) == (False, 6)


def test_pruned_folder_draws_no_weights(pruned) -> None:
    sample = pruned("vit")
    try:
        drawn = load_base(str(sample.folder), pretrained=False, seed=6).model
    except RecipeError as error:
        assert "pruned" in str(error)
    else:
        shapes = {name: tensor.shape for name, tensor in sample.model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in drawn.state_dict().items()} == shapes


def test_isoprune_hub_id_opens_like_its_folder(offline: Path, pruned) -> None:
    sample = pruned("vit")
    put_in_cache(offline, "someone/pruned", sample.folder)
    base = load_base("someone/pruned")
    assert torch.equal(output_of(base.model, sample.images), sample.logits)
    assert base.model.config.source == sample.model.config.source
    assert output_of(load_base("someone/pruned", num_labels=3).model, sample.images).shape == (2, 3)


def test_folder_with_another_model_type_is_refused(pruned, tmp_path: Path) -> None:
    folder = copy_of(pruned("vit").folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for kind in ("vit", "bert", "timm_wrapper", "nosuch"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        refused(str(folder), IsoPruneError)


def test_labels_keep_order_with_random_weights(tmp_path: Path) -> None:
    names = tuple(f"class {chr(97 + index)}" for index in range(12))  # 10 and 11 come before 2 in the JSON
    base = tiny(num_labels=12, label_names=names)
    save_model_folder(tmp_path, base.model, base.processor)
    for pretrained in (True, False):
        assert load_base(str(tmp_path), pretrained=pretrained).model.config.id2label == dict(enumerate(names))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_folder_replaced_while_read_is_read_again(
    is_damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of two models are never mixed, whether that would be an error or not."""
    first, second = tiny(num_labels=3, seed=5), tiny(num_labels=3, seed=6)
    for name, base in (("out", first), ("next", second)):
        save_model_folder(tmp_path / name, base.model, base.processor)
    read, places = IsoPruneForImageClassification.from_pretrained, []

    def read_slowly(place: str, **options: object) -> object:
        model = read(place, **options)
        places.append(place)
        if len(places) == 1:
            os.rename(place, tmp_path / "old")
            os.rename(tmp_path / "next", place)
            if is_damaged:
                raise RuntimeError("another size")
        return model

    monkeypatch.setattr(IsoPruneForImageClassification, "from_pretrained", read_slowly)
    found = load_base(str(tmp_path / "out")).model
    assert_same(weights(found), weights(second.model))
    assert len(places) == 2


def test_folder_that_is_always_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny(num_labels=3, seed=5)
    save_model_folder(tmp_path, base.model, base.processor)

    def replace(place: str, **_: object) -> None:
        Path(place, "other").touch()
        Path(place, "other").unlink()
        raise RuntimeError("another size")

    monkeypatch.setattr(IsoPruneForImageClassification, "from_pretrained", replace)
    with pytest.raises(CheckpointError, match="20 times"):
        load_base(str(tmp_path))
