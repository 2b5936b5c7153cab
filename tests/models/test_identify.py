"""Names of bases: what they mean, and how wrong ones are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.bases import (
    TINY,
    assert_same,
    put_in_cache,
    refused,
    tiny,
    weights,
)

from isoprune_hf.models import load_base
from isoprune_hf.models.identify import BaseSource, identify


def test_path_below_home_folder_opens(transformers_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = transformers_folder("hf-vit")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert_same(weights(load_base("~/hf-vit").model), weights(load_base(str(folder)).model))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm/resnet5O", "resnet50"),
        ("resnet5O", "resnet50"),
        ("timm/deit_small_patch16_24", "deit_small_patch16_224"),
        ("swin_tiny_patch4_windw7_224", "swin_tiny_patch4_window7_224"),
        ("torchvision/mobilenet_v22", "mobilenet_v2"),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    message = refused(name)
    assert name in message and re.search(rf"; did you mean .*\b{near}\b.*\?$", message)


def test_name_near_nothing_gets_no_suggestion() -> None:
    for name in ("zzzzqqqq", "timm/zzzzqqqq", "torchvision/zzzzqqqq"):
        message = refused(name)
        assert name in message and "did you mean" not in message


@pytest.mark.parametrize("name", ["{}/nosuch", "./nosuch", "../nosuch", "~/nosuch_folder", "a/b/c"])
def test_missing_folder_is_refused(name: str, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    assert repr(name) in refused(name)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"x"', "{}", '{"model_type": "nosuch"}', '{"a": 1}'])
def test_folder_without_model_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert str(tmp_path) in refused(str(tmp_path))


@pytest.mark.parametrize(
    "name", [TINY, "vit_tiny_patch16_224", "torchvision/squeezenet1_1", "someone/model", "timm/resnet50.a1_in1k"]
)
def test_trained_weights_need_a_network(name: str, offline: Path) -> None:
    message = refused(name)
    assert (
        "could not be fetched" in message and name.removeprefix("timm/") in message and "--prune.pretrained" in message
    )


@pytest.mark.parametrize(
    "name", ["", " ", "\t", "\0", "a/\0", "timm/\x1b[31m", 5, None, True, ["timm/resnet18"], b"resnet18"]
)
def test_value_that_is_no_name_is_refused(name: Any) -> None:
    message = refused(name)
    assert message.startswith(f"model: {name!r} ") and "timm/NAME, torchvision/NAME, a Hub id or a folder" in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm/", "has no model timm/"),
        ("torchvision/", "torchvision/ is unknown"),
        ("torchvision/.X", "torchvision/ is unknown"),
        ("torchvision/resnet50.NOPE", "has no weights 'NOPE'; available: IMAGENET1K_V1, IMAGENET1K_V2"),
        ("timm/resnet50.nope_tag", "unknown weights 'nope_tag'; timm has resnet50.a1_in1k, "),
        ("timm/resnet50.", "unknown weights ''; timm has resnet50.a1_in1k, "),
        ("timm/timm/resnet18", "does not exist"),
        ("https://huggingface.co/timm/resnet18", "does not exist"),
        ("hub:timm/resnet18", "nor a Hub id of the form owner/name"),
        ("a b/c", "nor a Hub id of the form owner/name"),
        ("\u00fc/\u00fc", "nor a Hub id of the form owner/name"),
        ("~nosuch_user/x", "does not exist"),
        ("x" * 5000, "has no model timm/xxx"),
        ("a/" + "x" * 5000, "could not be fetched"),
        ("torchvision/fasterrcnn_resnet50_fpn", "not an image classifier"),
        ("torchvision/deeplabv3_resnet50", "not an image classifier"),
    ],
)
def test_malformed_name_is_explained(name: str, said: str, offline: Path) -> None:
    assert said in refused(name)


def test_spaces_around_a_name_are_ignored() -> None:
    assert tiny(name=f" {TINY}\n").model.config.source["name"] == TINY


@pytest.mark.parametrize(
    ("name", "library", "place"),
    [
        ("resnet50.a1_in1k", "timm", "resnet50.a1_in1k"),
        ("timm/resnet50", "timm", "resnet50"),
        (" torchvision/resnet50.IMAGENET1K_V2\n", "torchvision", "resnet50.IMAGENET1K_V2"),
    ],
)
def test_architecture_name_needs_no_config(name: str, library: str, place: str) -> None:
    assert identify(name) == BaseSource(name.strip(), library, "architecture", place, {})


@pytest.mark.parametrize(
    ("config", "library"),
    [
        ({"model_type": "isoprune"}, "isoprune"),
        ({"model_type": "timm_wrapper"}, "timm"),
        ({"architecture": "resnet50"}, "timm"),
        ({"model_type": "vit", "architecture": "x"}, "transformers"),
        ({}, "transformers"),
    ],
)
def test_config_of_a_folder_names_its_library(config: dict[str, Any], library: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert identify(tmp_path) == BaseSource(str(tmp_path), library, "folder", str(tmp_path), config)


def test_hub_id_is_identified_from_the_cache(offline: Path, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "config.json").write_text('{"model_type": "vit"}')
    put_in_cache(offline, "someone/vit", tmp_path / "repo")
    source = identify("someone/vit")
    assert (source.library, source.kind, source.place) == ("transformers", "hub", "someone/vit")
    assert source.config["model_type"] == "vit"
