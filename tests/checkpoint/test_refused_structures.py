"""Damaged and hostile structures in a config are refused by name."""

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.folders import logits, refused
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
)

from isoprune_hf.checkpoint.modeling_isoprune import (
    apply_structure,
)
from isoprune_hf.errors import CheckpointError


def test_copied_folder_opens(edited, pruned) -> None:
    model = AutoModelForImageClassification.from_pretrained(edited())
    assert torch.equal(logits(model, pruned("vit").images), pruned("vit").logits)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.mlp.fc1.bias", [129]),  # the base has 4 x 32 = 128
        ("blocks.0.mlp.fc1.weight", [128, 33]),
        ("blocks.0.mlp.fc1.weight", [10**9, 10**9]),
        ("blocks.0.mlp.fc1.bias", [0]),
        ("blocks.0.mlp.fc1.bias", [-1]),
        ("blocks.0.mlp.fc1.bias", [True]),
        ("blocks.0.mlp.fc1.bias", [100.0]),
        ("blocks.0.mlp.fc1.bias", [[100]]),
        ("blocks.0.mlp.fc1.bias", []),
        ("blocks.0.mlp.fc1.bias", [100, 1]),
        ("blocks.0.mlp.fc1.weight", [100]),
        ("blocks.0.mlp.fc1.bias", "100"),
        ("blocks.0.mlp.fc1.bias", None),
        ("blocks.0.mlp.fc1.bias", {"0": 100}),
        ("blocks.0.mlp.fc9.bias", [1]),
        ("model.blocks.0.mlp.fc1.bias", [1]),
        ("", [1]),
        ("other", []),
    ],
)
def test_shape_outside_the_base_is_refused(name: str, shape: Any, edited) -> None:
    folder = edited(lambda config: config["structure"]["shapes"].update({name: shape}))
    assert refused(folder).startswith(f"config.structure.shapes[{name!r}]: ")


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("blocks.0.mlp.fc1", "nosuch", 1),
        ("blocks.0.mlp.fc1", "_parameters", 1),
        ("blocks.0.mlp.fc1", "__class__", 1),
        ("blocks.0.mlp.fc1", "forward", 1),
        ("blocks.0.mlp.fc1", "weight", 1),
        ("blocks.0.mlp.fc1", "", 1),
        ("blocks.0.mlp.fc1", "training", True),
        ("blocks.0.mlp.fc1", "training", 1),
        ("blocks.0.mlp.fc1", "in_features", "16"),
        ("blocks.0.mlp.fc1", "in_features", True),
        ("blocks.0.mlp.fc1", "in_features", 16.0),
        ("blocks.0.mlp.fc1", "in_features", [16]),
        ("blocks.0.mlp.fc1", "in_features", None),
        ("blocks.0.mlp.fc1", "in_features", 0),
        ("blocks.0.mlp.fc1", "in_features", -16),
        ("blocks.0.mlp.fc1", "in_features", 33),
        ("blocks.0.norm1", "normalized_shape", [33]),
        ("blocks.0.norm1", "normalized_shape", [16, 2]),
        ("blocks.0.norm1", "normalized_shape", []),
        ("blocks.0.norm1", "normalized_shape", 16),
        ("blocks.0.norm1", "eps", math.nan),
        ("blocks.0.norm1", "eps", math.inf),
        ("blocks.0.norm1", "eps", 0.0),
        ("blocks.0.norm1", "eps", -1e-6),
        ("blocks.0.norm1", "eps", 1),
        ("blocks.0.norm1", "eps", "1e-6"),
        ("blocks.0.attn", "fused_attn", 1),
        ("blocks.0.attn", "fused_attn", False),
        ("patch_embed.proj", "padding_mode", "zeros"),
        ("patch_embed.proj", "padding", [1, 1]),
        ("", "num_prefix_tokens", 2),
    ],
)
def test_attribute_outside_the_base_is_refused(path: str, name: str, value: Any, edited) -> None:
    folder = edited(lambda config: config["structure"]["attributes"].setdefault(path, {}).update({name: value}))
    assert refused(folder).startswith(f"config.structure.attributes[{path!r}][{name!r}]: ")


@pytest.mark.parametrize(
    ("path", "entries"),
    [("nosuch", {"a": 1}), ("blocks.9", {}), ("blocks.0", []), ("blocks.0", 1), ("blocks.0", None)],
)
def test_attributes_of_unknown_module_are_refused(path: str, entries: Any, edited) -> None:
    folder = edited(lambda config: config["structure"]["attributes"].update({path: entries}))
    assert refused(folder).startswith(f"config.structure.attributes[{path!r}]: ")


@pytest.mark.parametrize(
    "removed", [["nosuch"], [""], ["blocks.0", "blocks.9"], [1], [None], [["blocks.0"]], [{}], "blocks.0", {"a": 1}, 3]
)
def test_removed_entry_of_wrong_form_is_refused(removed: Any, edited) -> None:
    folder = edited(lambda config: config["structure"].update(removed=removed))
    assert refused(folder).startswith("config.structure")


def test_removed_module_inside_removed_module_is_refused(edited) -> None:
    folder = edited(lambda config: config["structure"].update(removed=["blocks.0", "blocks.0.attn.qkv"]))
    assert refused(folder).startswith("config.structure.removed: ")


@pytest.mark.parametrize(
    "structure",
    [
        {"shapes": {}, "code": "x"},
        {"shapes": [["blocks.0.mlp.fc1.bias", [1]]]},
        {"attributes": ["blocks.0"]},
        {"shapes": "x"},
        ["shapes"],
        "shapes",
        7,
        True,
    ],
)
def test_structure_of_wrong_form_is_refused(structure: Any, edited) -> None:
    folder = edited(lambda config: config.update(structure=structure))
    assert refused(folder).startswith("config.structure: ")


@pytest.mark.parametrize("version", [4, 10**9, "1", 0, -1, None, True, 1.0, [1]])
def test_unknown_format_version_is_refused(version: Any, edited) -> None:
    folder = edited(lambda config: config.update(format_version=version))
    assert refused(folder).startswith(f"config.format_version: {version!r} ")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("dtype", dtype) for dtype in (False, "", [], {}, 0, "int64", "float8_e4m3fn", "nn", "torch.float32")),
        *(("torch_dtype", dtype) for dtype in (True, "", "int64")),
    ],
)
def test_unsupported_dtype_is_refused(name: str, dtype: Any, edited) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["dtype"]
        config[name] = dtype

    assert refused(edited(change)).startswith(f"config.dtype: {dtype!r} ")


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("vit", lambda config: config["structure"].update(attributes={})),
        ("vit", lambda config: config["structure"]["attributes"].pop("blocks.0.norm1")),
        ("swin", lambda config: config["structure"].update(attributes={})),
        ("hf-vit", lambda config: config["structure"].update(attributes={})),
        ("vit", lambda config: config.update(image_size=[1, 16, 16])),
        ("vit", lambda config: config.update(image_size=[3, 32, 32])),
        ("vit", lambda config: config.pop("image_size")),
    ],
)
def test_structure_that_does_not_run_allocates_nothing(
    family: str, edit: Callable, edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reached = edited(edit, family=family), []
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *_: reached.append(1))
    assert refused(folder).startswith("config.image_size: the model does not run on ")
    assert reached == []


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("shapes", ""),
        ("shapes", 0),
        ("shapes", []),
        ("attributes", False),
        ("attributes", []),
        ("removed", ""),
        ("removed", 0),
        ("removed", {}),
    ],
)
def test_empty_part_of_wrong_type_is_refused(part: str, value: Any, edited) -> None:
    folder = edited(lambda config: config["structure"].update({part: value}))
    assert refused(folder).startswith("config.structure: shapes and attributes ")


@pytest.mark.parametrize("structure", ["", 0, False, []])
def test_empty_structure_of_wrong_type_is_refused(structure: Any, edited) -> None:
    assert refused(edited(lambda config: config.update(structure=structure))).startswith("config.structure: ")


@pytest.mark.parametrize(
    "path", ["bl\u00f6cke.0", "\u202eblocks.0", "blocks.0\n", "blocks\x00", "blocks..0", "blocks.0.", "."]
)
def test_odd_paths_are_refused_in_one_line(path: str, edited) -> None:
    for part, entry in (("shapes", {path: [1]}), ("attributes", {path: {path: 1}}), ("removed", [path])):
        message = refused(edited(lambda config, p=part, e=entry: config["structure"].update({p: e})))
        assert message.startswith(f"config.structure.{part}") and repr(path) in message
        shutil.rmtree(edited.folder)


def test_structure_is_checked_on_meta_device() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(10**7, 10**7))  # 400 TB
    with pytest.raises(CheckpointError, match=r"shapes\['0\.bias'\]: \[10000001\] .* \[10000000\]"):
        apply_structure(base, {"shapes": {"0.bias": [10**7 + 1]}})
    apply_structure(base, {"shapes": {"0.bias": [10**7 - 1]}})
    assert base[0].bias.shape == (10**7 - 1,) and base[0].bias.is_meta
