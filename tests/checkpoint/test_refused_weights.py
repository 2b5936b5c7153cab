"""Damaged and hostile weights are refused by name, before memory is allocated."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import VIT_BASE, config_of, edit_weights, logits, refused
from helpers.tiny_models import VIT
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
)

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoPruneForImageClassification,
)
from isoprune_hf.errors import CheckpointError


def shard(folder: Path, index: Any) -> None:
    """Move the weights next to the folder, and write an index into it."""
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    if not isinstance(index, str):
        index = json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(index)


class Planted:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("family", ["vit", "hf-vit", "resnet"])
def test_missing_tensor_is_refused(family: str, edited) -> None:
    folder = edited(family=family)
    names = sorted(load_file(folder / "model.safetensors"))
    for name in (names[0], names[-1]):
        edit_weights(folder, lambda weights, name=name: weights.pop(name))
        assert refused(folder).startswith(f"tensor {names[0]!r}: ")


@pytest.mark.parametrize("name", ["extra", "model.blocks.0.mlp.fc3.weight", "head.weight"])
def test_additional_tensor_is_refused(name: str, edited) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(2)}))
    assert refused(folder).startswith(f"tensor {name!r}: ")


def test_tensor_of_another_shape_is_refused(edited) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({"model.head.weight": torch.zeros(7, 33)}))
    kept = config_of(folder)["structure"]["shapes"]["head.weight"]
    message = refused(folder)
    assert message.startswith("tensor 'model.head.weight': ") and "[7, 33]" in message and str(kept) in message


def test_shape_that_differs_from_file_is_refused(edited) -> None:
    folder = edited(lambda config: config["structure"]["shapes"].update({"blocks.0.mlp.fc1.bias": [1]}))
    stored = list(load_file(folder / "model.safetensors")["model.blocks.0.mlp.fc1.bias"].shape)
    message = refused(folder)
    assert message.startswith("tensor 'model.blocks.0.mlp.fc1.bias': ") and str(stored) in message and "[1]" in message


@pytest.mark.parametrize(
    ("damage", "with_dtype"),
    [
        (lambda content: content[:-40], True),
        (lambda content: content[:-40], False),
        (lambda content: content[: len(content) // 2], False),
        (lambda content: content[:20], True),
        (lambda content: b"", True),
        (lambda content: b"", False),
        (lambda content: b"no safetensors at all, only text" * 9, True),
        (lambda content: (2**62).to_bytes(8, "little") + content[8:], False),
        (lambda content: bytes(len(content)), True),
    ],
)
def test_damaged_file_is_refused(with_dtype: bool, damage: Callable[[bytes], bytes], edited) -> None:
    folder = edited(lambda config: None if with_dtype else config.pop("dtype"))
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert refused(folder).startswith("model.safetensors: not a readable safetensors file (")


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
)
def test_weight_that_is_no_float_is_refused(dtype: torch.dtype, edited) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({"model.head.bias": weights["model.head.bias"].to(dtype)}))
    assert re.match(r"tensor 'model\.head\.bias': .* \[7\] of .*, .* \[7\] of floats$", refused(folder))


def test_counter_that_is_no_integer_is_refused(edited) -> None:
    folder = edited(family="resnet")
    name = "model.bn1.num_batches_tracked"
    edit_weights(folder, lambda weights: weights.update({name: weights[name].float()}))
    assert (
        refused(folder) == f"tensor {name!r}: the checkpoint has [] of floats, the config requires [] of torch.int64"
    )


def test_weights_in_float64_open(edited, pruned) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({name: w.double() for name, w in weights.items()}))
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(model, pruned("vit").images), pruned("vit").logits)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "",
        [],
        7,
        None,
        {},
        {"metadata": {}},
        {"weight_map": {}},
        {"metadata": 5, "weight_map": {"model.head.bias": "x.safetensors"}},
        {"metadata": {}, "weight_map": []},
        {"metadata": {}, "weight_map": {"model.head.bias": 1}},
        {"metadata": {}, "weight_map": {"model.head.bias": ["x.safetensors"]}},
        {"metadata": {}, "weight_map": {"model.head.bias": "nosuch.safetensors"}},
        {"metadata": {}, "weight_map": {"model.head.bias": "../outside.safetensors"}},
        {"metadata": {}, "weight_map": {"model.head.bias": "x/../../outside.safetensors"}},
        {"metadata": {}, "weight_map": {"model.head.bias": ""}},
    ],
)
def test_damaged_or_hostile_index_is_refused(index: Any, edited) -> None:
    folder = edited()
    shard(folder, index)
    assert re.match(r"model\.safetensors\.index\.json: |.*: no such file in ", refused(folder))


def test_index_with_absolute_path_is_refused(edited) -> None:
    folder = edited()
    shard(folder, {"metadata": {}, "weight_map": {"model.head.bias": str(folder.parent / "outside.safetensors")}})
    assert ": no such file in " in refused(folder)


def test_folder_without_weights_is_refused(edited) -> None:
    folder = edited()
    (folder / "model.safetensors").unlink()
    assert refused(folder).startswith("'model.safetensors': no such file in ")
    (folder / "model.safetensors").mkdir()
    assert refused(folder).startswith("'model.safetensors': no such file in ")


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (IsoPruneForImageClassification, {}),
        (AutoModelForImageClassification, {}),
        (AutoModelForImageClassification, {"use_safetensors": False}),
        (IsoPruneForImageClassification, {"weights_only": False}),
    ],
)
def test_pickle_is_never_opened(cls: type, options: dict[str, bool], edited, tmp_path: Path) -> None:
    folder = edited()
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Planted(tmp_path / "sentinel")}, folder / "pytorch_model.bin")
    with pytest.raises((CheckpointError, OSError), match=r"model\.safetensors"):
        cls.from_pretrained(folder, **options)
    assert not (tmp_path / "sentinel").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "sentinel").exists()  # the trap works


def test_pickled_shard_is_not_opened(edited, tmp_path: Path) -> None:
    folder = edited()
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Planted(tmp_path / "sentinel")}, folder / "weights.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder).startswith("weights.bin: not a readable safetensors file (")
    assert not (tmp_path / "sentinel").exists()


def test_mismatch_is_refused_whatever_the_options(edited) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({"model.head.weight": torch.zeros(7, 33)}))
    for options in ({"ignore_mismatched_sizes": True}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}):
        with pytest.raises(CheckpointError, match=r"^tensor 'model\.head\.weight': "):
            AutoModelForImageClassification.from_pretrained(folder, **options)


def test_claim_of_terabytes_allocates_nothing(edited, monkeypatch: pytest.MonkeyPatch) -> None:
    # 10^6 wide, two blocks: 24 x 10^12 weights. On the meta device they cost nothing.
    folder = edited(
        lambda config: config.update(structure=None, base={**VIT_BASE, "args": {**VIT, "embed_dim": 10**6}})
    )
    reached = []
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *_: reached.append(1))
    assert refused(folder).startswith("tensor ")
    assert reached == []
