"""Invalid entries of a config are refused by name, and unsafe or endless bases are never built."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers.tiny_models import TRANSFORMERS, VIT
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from isoprune_hf.checkpoint.dense import IsoPruneConfig, build_base, build_limited
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.plain_values import check_args
from isoprune_hf.errors import CheckpointError

BASE = {"library": "timm", "architecture": "vit_tiny_patch16_224", "args": VIT}
LABELS = {"0": "ant", "1": "bee", "2": "cat"}
HUGE = 10**30


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    IsoPruneForImageClassification(IsoPruneConfig(base=BASE, id2label=LABELS, image_size=[3, 16, 16])).save_pretrained(
        folder
    )
    return folder


def edited(dense: Path, folder: Path, **entries: Any) -> Path:
    """Copy a folder of a dense model with other entries in its config.json."""
    for file in dense.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((dense / "config.json").read_text()), **entries}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(config: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        config()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("id2label", value) for value in ([], "x", 7, True, {}, {"a": "b"}, {"0": "a", "5": "b"}, {"0.0": "a"})),
        *(("id2label", {**LABELS, "1": value}) for value in (None, 1, ["a"], {"a": 1})),
        ("id2label", {"1": "a", "2": "b"}),
        ("id2label", {"-1": "a", "0": "b"}),
        *(("num_labels", value) for value in ("x", 0, -3, 2.5, True, HUGE, 10**12, [3])),
        *(("image_size", value) for value in ("x", [], [3], [3, 16], 224, {"a": 1}, True, [3, 16, 16, 16])),
        *(
            ("image_size", [3, 16, value])
            for value in (0, -1, 16.0, True, None, "16", math.nan, math.inf, HUGE, 10**9)
        ),
        *(("dtype", value) for value in ("nosuch", "int8", "Tensor", "float", 5, [1], {"a": 1}, "torch.int64")),
        *((name, value) for name in ("base", "source", "cost", "recipe") for value in (5, "x", [], True)),
        *(("stage", value) for value in (5, None, [])),
        *(("format_version", value) for value in (0, 4, "1", True, 1.0, None, math.nan, HUGE, [1])),
    ],
)
def test_entry_of_wrong_form_is_refused_by_name(name: str, value: Any, dense: Path, tmp_path: Path) -> None:
    folder = edited(dense, tmp_path, **{name: value})
    for open_it in (AutoModelForImageClassification.from_pretrained, AutoConfig.from_pretrained):
        assert refused(lambda open_it=open_it: open_it(folder)).startswith(f"config.{name}: ")


@pytest.mark.parametrize("value", [None, [], {}, "x", 7, {"ant": 9}, {"a": "b"}])
def test_label2id_is_always_the_inverse_of_id2label(value: Any, dense: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(edited(dense, tmp_path, label2id=value))
    assert config.id2label == {0: "ant", 1: "bee", 2: "cat"} and config.label2id == {"ant": 0, "bee": 1, "cat": 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_implementation", "someone/kernel"),
        ("_attn_implementation", "someone/kernel"),
        ("_attn_implementation_internal", "someone/kernel"),
        ("experts_implementation", "someone/kernel"),
        ("quantization_config", 5),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("per_layer_config", 5),
        ("layer_types", 5),
        ("use_return_dict", 3),
        ("to_dict", 3),
        ("save_pretrained", 3),
        ("from_pretrained", "x"),
    ],
)
def test_entry_that_controls_transformers_is_dropped(name: str, value: Any, dense: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(edited(dense, tmp_path, **{name: value}))
    assert model.config._attn_implementation in ("sdpa", "eager")
    model.save_pretrained(tmp_path / "again")
    assert name not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_attention_implementation_of_the_caller_has_no_effect(dense: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        first, second = (
            AutoModelForImageClassification.from_pretrained(dense, **options)(images).logits
            for options in ({}, {"attn_implementation": "eager"})
        )
    assert torch.equal(first, second)


def test_field_of_a_later_version_is_kept(dense: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(edited(dense, tmp_path, later={"a": 1}))
    assert config.later == {"a": 1} and config.to_dict()["later"] == {"a": 1}


@pytest.mark.parametrize(
    "value", [HUGE, -HUGE, 10**9, math.nan, math.inf, -math.inf, 1e300, [2, [math.nan]], {"a": math.nan}]
)
@pytest.mark.parametrize("name", ["depth", "drop_rate", "nosuch"])
def test_argument_of_unusual_size_is_refused(name: str, value: Any) -> None:
    message = refused(lambda: check_args({"img_size": 16, name: value}))
    assert message.startswith(f"config.base.args: {name}=") and " is not allowed" in message


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_dropout_prob", "nosuch", "label2id"])
@pytest.mark.parametrize("value", [10**9, math.nan, math.inf, {"a": {"b": [math.nan]}}])
def test_transformers_entry_of_unusual_size_is_refused(name: str, value: Any) -> None:
    values = TRANSFORMERS["hf-vit"].to_diff_dict() | {"model_type": "vit", name: value}
    config = IsoPruneConfig(base={"library": "transformers", "config": values}, num_labels=3)
    assert refused(lambda: build_base(config)).startswith(f"config.base.config: {name}=")


@pytest.mark.parametrize(
    "base",
    [
        {**BASE, "args": {**VIT, "depth": 10**5}},
        pytest.param(
            {
                "library": "transformers",
                "config": TRANSFORMERS["hf-vit"].to_diff_dict() | {"model_type": "vit", "num_hidden_layers": 10**5},
            },
            marks=pytest.mark.families,
        ),
    ],
    ids=["timm", "transformers"],
)
@pytest.mark.families
def test_base_of_too_many_layers_is_stopped_early(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[build_base.__module__], "MAX_MODULES", 2000)
    start = time.monotonic()
    with torch.device("meta"):
        message = refused(lambda: build_base(IsoPruneConfig(base=base, num_labels=3)))
    assert "more than 2000 modules" in message
    assert time.monotonic() - start < 120


def test_limit_on_modules_ends_with_the_builder() -> None:
    with pytest.raises(CheckpointError, match=r"^cannot: ValueError: more than 20000 modules$"):
        build_limited("cannot", lambda: nn.Sequential(*[nn.Identity()] * 20_001))
    assert len(build_limited("cannot", lambda: nn.Sequential(*[nn.Identity()] * 20_000))) == 20_000
    assert len(nn.Sequential(*[nn.Identity()] * 20_001)) == 20_001


def test_base_configured_for_tuples_returns_logits() -> None:
    values = TRANSFORMERS["hf-vit"].to_diff_dict() | {"model_type": "vit", "return_dict": False}
    config = IsoPruneConfig(base={"library": "transformers", "config": values}, num_labels=3)
    with torch.no_grad():
        assert IsoPruneForImageClassification(config)(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)


@pytest.mark.parametrize("name", ["regnet_y_400mf", "regnet_x_400mf"])
def test_builder_that_reads_tensors_builds_on_meta(name: str) -> None:
    base = {"library": "torchvision", "architecture": name, "args": {}}
    with torch.device("meta"):
        network = build_base(IsoPruneConfig(base=base, num_labels=7, image_size=[3, 224, 224]))
    own = torchvision.models.get_model(name, num_classes=7)
    assert {key: tensor.shape for key, tensor in network.state_dict().items()} == {
        key: tensor.shape for key, tensor in own.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in network.state_dict().values())


@pytest.mark.families
def test_every_family_of_torchvision_builds_on_meta() -> None:
    names = torchvision.models.list_models(torchvision.models)
    families = {torchvision.models.get_model_builder(name).__module__: name for name in names}
    assert len(families) >= 17
    for name in families.values():
        base = {"library": "torchvision", "architecture": name, "args": {}}
        with torch.device("meta"):
            network = build_base(IsoPruneConfig(base=base, num_labels=7, image_size=[3, 224, 224]))
        assert all(parameter.is_meta for parameter in network.parameters()), name
