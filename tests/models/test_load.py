"""Heads, labels, seeds and options of `load_base`."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers.bases import (
    TINY,
    WRAPPED,
    assert_same,
    put_in_cache,
    refused,
    save_timm,
    save_wrapped,
    tiny,
    weights,
)
from helpers.tiny_models import TRANSFORMERS, VIT
from safetensors.torch import load_file, save_file

from isoprune_hf.errors import IsoPruneError, RecipeError
from isoprune_hf.models import load_base


def test_seed_decides_weights_without_changing_random_state() -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, again, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    headed = tiny(seed=3, num_labels=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(weights(first.model), weights(again.model))
    assert_same(weights(headed.model), weights(tiny(seed=3, num_labels=5).model))
    drawn = [name for name, tensor in first.model.named_parameters() if tensor.unique().numel() > 1]
    assert len(drawn) > 8
    assert not any(torch.equal(first.model.get_parameter(name), other.model.get_parameter(name)) for name in drawn)


@pytest.mark.parametrize(("name", "args"), [(TINY, VIT), ("torchvision/mobilenet_v2", {"width_mult": 0.25})])
def test_new_head_changes_only_the_head(name: str, args: dict[str, Any]) -> None:
    whole = load_base(name, pretrained=False, model_args=args, seed=2).model
    headed = load_base(name, pretrained=False, model_args=args, seed=2, num_labels=6).model
    assert headed.config.num_labels == 6 and headed.config.source["num_labels"] == 6
    before, after = weights(whole.model), weights(headed.model)
    changed = {key for key in before if before[key].shape != after[key].shape}
    assert changed in ({"head.weight", "head.bias"}, {"classifier.1.weight", "classifier.1.bias"})
    assert_same(*({k: v for k, v in part.items() if k not in changed} for part in (before, after)))
    head = after["head.weight" if "head.weight" in changed else "classifier.1.weight"]
    assert head.shape[0] == 6 and head.unique().numel() > 6
    assert not headed.training


def test_network_with_versioned_state_gets_new_head() -> None:
    whole = load_base("torchvision/mnasnet0_5", pretrained=False, seed=2).model
    headed = load_base("torchvision/mnasnet0_5", pretrained=False, seed=2, num_labels=6).model
    assert headed.model.classifier[1].weight.shape == (6, 1280)
    assert torch.equal(headed.model.layers[0].weight, whole.model.layers[0].weight)


def test_same_number_of_labels_keeps_trained_head(tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    kept = load_base(str(folder), num_labels=4)
    assert_same(weights(kept.model), weights(load_base(str(folder)).model))
    assert kept.model.config.id2label == {0: "ant", 1: "bee", 2: "cat", 3: "dog"}


def test_labels_are_those_of_base_or_given() -> None:
    names = tiny().model.config.id2label
    # The spelling of the image classifiers of transformers.
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[1] == "goldfish, Carassius auratus"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    names = load_base("torchvision/mobilenet_v2", pretrained=False).model.config.id2label
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")
    config = tiny(num_labels=3, label_names=("cat", "dog", "owl")).model.config
    assert config.id2label == {0: "cat", 1: "dog", 2: "owl"} and config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    config = tiny(num_labels=3).model.config
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_random_head_of_same_size_takes_names(tmp_path: Path) -> None:
    names = ("one", "two", "three", "four")
    folder = str(save_timm(tmp_path))
    drawn = load_base(folder, pretrained=False)
    named = load_base(folder, pretrained=False, num_labels=4, label_names=names).model
    assert named.config.id2label == dict(enumerate(names))
    assert_same(weights(named), weights(drawn.model))
    # The classes of trained weights are those of their training.
    kept = load_base(folder, num_labels=4, label_names=names).model
    assert kept.config.id2label == {0: "ant", 1: "bee", 2: "cat", 3: "dog"}


def test_number_of_label_names_must_match() -> None:
    with pytest.raises(RecipeError, match="num_labels"):
        tiny(num_labels=3, label_names=("cat", "dog"))


@pytest.mark.parametrize("name", [TINY, "torchvision/mobilenet_v2"])
def test_model_args_need_random_weights(name: str) -> None:
    assert "prune.model_args" in refused(name, pretrained=True, model_args={"width_mult": 0.25})


@pytest.mark.parametrize("kind", ["transformers", "timm", "ours"])
def test_folder_takes_no_model_args(kind: str, transformers_folder, pruned, tmp_path: Path) -> None:
    folders = {
        "transformers": lambda: transformers_folder("hf-vit"),
        "timm": lambda: save_timm(tmp_path),
        "ours": lambda: pruned("vit").folder,
    }
    assert "model_args" in refused(str(folders[kind]()), model_args={"depth": 1})


@pytest.mark.parametrize(
    ("name", "args"),
    [
        (TINY, {"nosuch": 1}),
        (TINY, {"embed_dim": 30, "num_heads": 4}),
        (TINY, {"num_heads": 0}),
        (TINY, {"patch_size": 0}),
        (TINY, {"act_layer": "nosuch"}),
        (TINY, {"drop_path_rate": "x"}),
        (TINY, {"num_classes": 3}),
        ("torchvision/mobilenet_v2", {"nosuch": 1}),
        ("torchvision/mobilenet_v2", {"width_mult": "x"}),
        ("torchvision/mobilenet_v2", {"num_classes": 3}),
    ],
)
def test_unsuitable_argument_is_refused(name: str, args: dict[str, Any]) -> None:
    message = refused(name, pretrained=False, model_args=args)
    assert all(key in message for key in args)


@pytest.mark.parametrize(
    ("family", "damage"),
    [
        *(("hf-vit", damage) for damage in ("gone", "cut", "another shape", "a tensor short")),
        *(("timm", damage) for damage in ("gone", "cut", "another shape", "a tensor short")),
        ("isoprune", "cut"),  # the others: tests/checkpoint/test_refused_weights.py
    ],
)
def test_folder_with_damaged_weights_is_refused(
    family: str, damage: str, transformers_folder, pruned, tmp_path: Path
) -> None:
    source = {"hf-vit": lambda: transformers_folder("hf-vit"), "isoprune": lambda: pruned("vit").folder}
    source = source.get(family, lambda: save_timm(tmp_path))()
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = folder / "model.safetensors"
    stored = load_file(file)
    name = next(key for key in sorted(stored) if re.search(r"fc1\.weight|intermediate\.dense\.weight", key))
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "another shape":
        save_file({**stored, name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    else:
        save_file({key: tensor for key, tensor in stored.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(IsoPruneError) as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("args", [[], [1], "x", 0, True, {5: 1}, {None: 1}])
def test_model_args_must_be_a_mapping(args: Any) -> None:
    assert refused(TINY, pretrained=False, model_args=args).startswith("prune.model_args must be a mapping ")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        (TINY, {"checkpoint_path": "weights.pth"}),
        (TINY, {"pretrained": True}),
        (TINY, {"pretrained_cfg": {"file": "x"}}),
        (TINY, {"pretrained_cfg_overlay": {"num_classes": 3}}),
        (TINY, {"features_only": True}),
        (TINY, {"cache_dir": "x"}),
        (TINY, {"depth": 10**9}),
        (TINY, {"drop_rate": float("nan")}),
        ("torchvision/mobilenet_v2", {"weights": "DEFAULT"}),
        ("torchvision/mobilenet_v2", {"width_mult": 10**9}),
    ],
)
def test_unsafe_argument_never_reaches_the_builder(
    name: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: reached.append(1))
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: reached.append(1))
    message = refused(name, pretrained=False, model_args=args)
    assert "is not allowed" in message and next(iter(args)) in message and reached == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(({"num_labels": value}, "prune.num_labels") for value in (0, -1, "x", 2.5, True, 10**9)),
        *(({"seed": value}, "prune.seed") for value in ("x", -1, 1.5, None, True, 2**70)),
        *(({"num_labels": 2, "label_names": value}, "label_names") for value in ("ab", ("a", 5), ("a", None))),
    ],
)
def test_option_of_wrong_type_is_refused(options: dict[str, Any], said: str) -> None:
    message = refused(TINY, pretrained=False, model_args=VIT, **options)
    assert message.startswith(f"{said} must be ") and repr(next(reversed(options.values()))) in message


@pytest.mark.parametrize("family", ["hf-vit", "timm", "wrapped"])
def test_folder_without_weights_names_the_flag(family: str, tmp_path: Path) -> None:
    if family == "hf-vit":
        TRANSFORMERS[family].save_pretrained(tmp_path)
    elif family == "timm":
        tmp_path = save_timm(tmp_path)
    else:
        save_wrapped(tmp_path, *WRAPPED[0])
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    message = refused(str(tmp_path))
    assert str(tmp_path) in message and "model.safetensors" in message and "--prune.pretrained false" in message
    assert load_base(str(tmp_path), pretrained=False).model.config.source["pretrained"] is False


@pytest.mark.parametrize("kind", ["timm", "wrapped", "transformers", "isoprune"])
def test_hub_base_opens_at_its_commit(kind: str, offline: Path, tmp_path: Path, transformers_folder) -> None:
    base = tiny(num_labels=3)
    base.model.save_pretrained(tmp_path / "isoprune")
    base.processor.save_pretrained(tmp_path / "isoprune")
    folder = {
        "timm": lambda: save_timm(tmp_path),
        "wrapped": lambda: Path(save_wrapped(tmp_path / "wrapped", *WRAPPED[0]).config._name_or_path),
        "transformers": lambda: transformers_folder("hf-vit"),
        "isoprune": lambda: tmp_path / "isoprune",
    }[kind]()
    put_in_cache(offline, "someone/net", folder)
    opened = load_base("hf-hub:someone/net")
    (offline / "models--someone--net" / "refs" / "main").write_text("1" * 40)  # the branch has moved on
    again = load_base("someone/net", revision="0" * 40)
    assert_same(weights(again.model.model), weights(opened.model.model))
    if kind != "isoprune":  # whose weights are still those of the base
        assert opened.model.config.source["revision"] == "0" * 40
    with pytest.raises(IsoPruneError):
        load_base("someone/net")


def test_local_dir_opens_like_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_timm(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = load_base(f"local-dir:{folder.name}").model.config.source
    assert (source["name"], source["pretrained"]) == (str(folder), True)
