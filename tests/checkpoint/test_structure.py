"""The difference between a base and a cut model is captured and applied again."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.pruned_models import SAVED
from helpers.tiny_models import make_base, make_images
from torch import nn
from transformers import AutoModelForImageClassification

from isoprune_hf.checkpoint.difference import keep_cut_buffers
from isoprune_hf.checkpoint.modeling_isoprune import SkippedBlock, apply_structure, check_structure
from isoprune_hf.checkpoint.structure import capture_structure, image_size_of, meta_copy
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.attend = nn.LayerNorm((6, 4))
        self.num_heads, self.scale, self.kind, self.fused, self.window = 4, 0.5, "sdpa", True, (7, 7)
        self._private = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.register_buffer("table", torch.arange(6.0), persistent=False)
        self.register_buffer("grid", torch.arange(6.0).reshape(2, 3))
        self.num_features = 8


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


HAND_MADE: list[dict[str, Any]] = [
    {"shapes": {}, "attributes": {}, "removed": []},
    {"shapes": {"stem.weight": [6, 2]}, "attributes": {"stem": {"out_features": 6, "in_features": 2}}, "removed": []},
    {
        "shapes": {"blocks.0.conv.weight": [1, 2, 3, 1], "blocks.1.norm.running_var": [3], "grid": [1, 3]},
        "attributes": {
            "": {"num_features": 1},
            "blocks.0": {"num_heads": 1, "scale": 123.25, "window": [1, 7]},
            "blocks.0.attend": {"normalized_shape": [5, 4], "eps": 1e-3},
        },
        "removed": [],
    },
    {"shapes": {"stem.bias": [1]}, "attributes": {}, "removed": ["blocks.0"]},
    {"shapes": {}, "attributes": {"blocks.1": {"num_heads": 2}}, "removed": ["blocks.0.conv", "blocks.1.attend"]},
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("structure", HAND_MADE)
def test_captured_structure_equals_applied_structure(structure: dict[str, Any], device: str) -> None:
    given = copy.deepcopy(structure)
    skippable = {path: SkippedBlock() for path in structure["removed"]}
    changed = apply_structure(make_net().to(device), structure, skippable)
    assert capture_structure(make_net().to("meta"), changed) == given
    assert structure == given


def test_cut_tensor_keeps_leading_elements_and_flags() -> None:
    base, changed = make_net(), make_net()
    changed.stem.weight.requires_grad_(False)
    shapes = {"stem.weight": [6, 2], "stem.bias": [3], "blocks.0.norm.running_mean": [5], "grid": [1, 2]}
    assert apply_structure(changed, {"shapes": shapes}) is changed
    assert torch.equal(changed.stem.weight, base.stem.weight[:6, :2])
    assert torch.equal(changed.stem.bias, base.stem.bias[:3])
    assert isinstance(changed.stem.weight, nn.Parameter) and not changed.stem.weight.requires_grad
    assert isinstance(changed.stem.bias, nn.Parameter) and changed.stem.bias.requires_grad
    assert changed.grid.tolist() == [[0.0, 1.0]] and "grid" in changed.state_dict()
    assert "blocks.0.norm.running_mean" in dict(changed.named_buffers())
    # A view would keep the whole old storage alive.
    assert changed.stem.weight.untyped_storage().nbytes() == 6 * 2 * 4


def test_attributes_keep_the_types_of_the_base() -> None:
    values = {"num_heads": 2, "scale": 0.75, "window": [3, 3]}
    changed = apply_structure(make_net(), {"attributes": {"blocks.1": values}})
    assert (changed.blocks[1].num_heads, changed.blocks[1].scale, changed.blocks[1].window) == (2, 0.75, (3, 3))
    assert (changed.blocks[0].num_heads, changed.blocks[0].scale, changed.blocks[0].window) == (4, 0.5, (7, 7))


def test_removed_module_becomes_a_skipped_block() -> None:
    stand_in = SkippedBlock(2)
    skippable = {"blocks.0": stand_in, "blocks.1": SkippedBlock()}
    changed = apply_structure(make_net(), {"removed": ["blocks.0"]}, skippable)
    assert changed.blocks[0] is stand_in and type(changed.blocks[1]) is Block
    assert not any(name.startswith("blocks.0.") for name in changed.state_dict())


def test_only_numbers_of_modules_are_captured() -> None:
    base, changed = make_net(), make_net()
    block = changed.blocks[0]
    block.num_heads, block.scale, block.window = 3, 0.25, (7, 5)
    block.kind, block.fused, block._private, block.training = "eager", False, 2, False
    block.added = 9
    found = capture_structure(base, changed)
    assert found == {
        "shapes": {},
        "attributes": {"blocks.0": {"num_heads": 3, "scale": 0.25, "window": [7, 5]}},
        "removed": [],
    }


class Configured(nn.Module):
    """Two layers and their parent share a config; one layer has options of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(widths=(8, 6), heads=4, kind="sdpa", rate=0.1)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 8)
        self.first.config, self.second.config = self.config, self.config
        self.second.options = {"last": 8, "name": "linear", 3: 8}


def test_numbers_of_a_shared_config_are_captured_once() -> None:
    base, pruned = Configured(), Configured()
    pruned.config.widths, pruned.second.options["last"] = (5, 3), 5
    attributes = capture_structure(base, pruned)["attributes"]
    assert attributes == {"": {"config.widths": [5, 3]}, "second": {"options.last": 5}}
    rebuilt = apply_structure(Configured(), {"attributes": attributes})
    assert rebuilt.first.config.widths == (5, 3) and rebuilt.second.options["last"] == 5


@pytest.mark.parametrize(
    "name", ["config.nosuch", "config.__class__", "nosuch.widths", "first.out_features", "config."]
)
def test_unknown_entry_of_a_config_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"structure\.attributes"):
        apply_structure(Configured(), {"attributes": {"": {name: 4}}})


def test_entry_of_a_config_cannot_grow() -> None:
    with pytest.raises(CheckpointError, match=r"config\.heads"):
        apply_structure(Configured(), {"attributes": {"": {"config.heads": 5}}})


def test_capturing_changes_neither_model() -> None:
    base, changed = make_net(), apply_structure(make_net(), copy.deepcopy(HAND_MADE[2]))
    before = [copy.deepcopy(model.state_dict()) for model in (base, changed)]
    capture_structure(base, changed)
    torch.testing.assert_close([dict(model.state_dict()) for model in (base, changed)], [dict(s) for s in before])


@pytest.mark.parametrize("structure", [None, {}, {"shapes": None, "attributes": None, "removed": None}])
def test_empty_structure_changes_nothing(structure: dict | None) -> None:
    changed = apply_structure(make_net(), structure)
    assert capture_structure(make_net(), changed) == HAND_MADE[0]
    torch.testing.assert_close(dict(changed.state_dict()), dict(make_net().state_dict()), atol=0, rtol=0)


def test_refused_structure_changes_nothing() -> None:
    net = make_net()
    structure = {"shapes": {"stem.bias": [3]}, "attributes": {"stem": {"out_features": 3}}, "removed": ["nosuch"]}
    with pytest.raises(CheckpointError, match="'nosuch'"):
        apply_structure(net, structure)
    assert capture_structure(make_net(), net) == HAND_MADE[0]


def test_only_skippable_modules_can_be_removed() -> None:
    for skippable in ({}, {"blocks.1": SkippedBlock()}):
        with pytest.raises(CheckpointError, match=r"^config\.structure\.removed: 'blocks\.0'"):
            apply_structure(make_net(), {"removed": ["blocks.0"]}, skippable)


def test_private_attribute_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"config\.structure\.attributes\['blocks\.0'\]\['_private'\]"):
        check_structure(make_net(), {"attributes": {"blocks.0": {"_private": 2}}})


def test_cut_buffer_becomes_part_of_state_dict() -> None:
    base, pruned = make_net(), make_net()
    pruned.table = torch.tensor([1.0, 4.0])  # not the leading elements: no module could calculate it anew
    structure = capture_structure(base, pruned)
    assert structure["shapes"] == {"table": [2]}
    rebuilt = apply_structure(make_net(), structure)
    assert "table" in rebuilt.state_dict() and "table" not in pruned.state_dict()
    keep_cut_buffers(pruned, structure)
    rebuilt.load_state_dict(pruned.state_dict())
    assert rebuilt.table.tolist() == [1.0, 4.0]


def test_shared_tensor_is_cut_once_and_stays_shared() -> None:
    def make_tied() -> Net:
        net = make_net()
        net.blocks[1].norm.weight = net.blocks[0].norm.weight  # one parameter in two modules
        net.blocks[1].conv = net.blocks[0].conv  # one module in two places
        return net

    pruned = make_tied()
    pruned.blocks[0].norm.weight = pruned.blocks[1].norm.weight = nn.Parameter(torch.ones(5))
    pruned.blocks[0].conv.bias = nn.Parameter(torch.ones(5))
    rebuilt = apply_structure(make_tied(), capture_structure(make_tied(), pruned))
    assert rebuilt.blocks[0].norm.weight is rebuilt.blocks[1].norm.weight
    assert rebuilt.blocks[0].norm.weight.shape == rebuilt.blocks[1].conv.bias.shape == (5,)


def test_list_attribute_stays_a_list() -> None:
    base, pruned = make_net(), make_net()
    base.splits, pruned.splits = [4, 4], [3, 2]
    structure = capture_structure(base, pruned)
    assert structure["attributes"] == {"": {"splits": [3, 2]}}
    rebuilt = make_net()
    rebuilt.splits = [4, 4]
    assert apply_structure(rebuilt, structure).splits == [3, 2]
    with pytest.raises(CheckpointError, match=r"\['splits'\]: \[5, 2\] "):
        check_structure(base, {"attributes": {"": {"splits": [5, 2]}}})
    with pytest.raises(CheckpointError, match=r"\['splits'\]: \[5\] "):
        check_structure(base, {"attributes": {"": {"splits": [5]}}})


@pytest.mark.parametrize("family", SAVED)
def test_structure_rebuilds_the_pruned_architecture(family: str, pruned, tmp_path) -> None:
    # Opened anew: transformers' Swin writes numbers into its modules when it sees images.
    model = AutoModelForImageClassification.from_pretrained(pruned(family).folder)
    base = make_base(family, tmp_path)
    structure = model.config.structure
    rebuilt = apply_structure(meta_copy(base).model, structure)
    shapes = {name: tensor.shape for name, tensor in model.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes
    assert capture_structure(base.model, model.model) == structure
    assert capture_structure(base.model, rebuilt) == structure
    assert repr(rebuilt) == repr(model.model)


@pytest.mark.parametrize("family", ["vit", "hf-swin"])
def test_base_that_saw_images_is_cut_alike(family: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path)
    recipe = PruneRecipe(criterion="l1", round_to=1)
    fresh = prune_model(base, recipe).model
    images = make_images(base)
    base(images)
    seen = prune_model(base, recipe).model
    assert seen.config.structure == fresh.config.structure
    seen.save_pretrained(tmp_path / "seen")
    reopened = AutoModelForImageClassification.from_pretrained(tmp_path / "seen")
    with torch.no_grad():
        assert torch.equal(reopened(images).logits, fresh(images).logits)


def test_meta_copy_has_architecture_without_weights(pruned) -> None:
    model = pruned("swin").model
    before = copy.deepcopy(model.config.to_dict())
    twin, dense = meta_copy(model), meta_copy(model, dense=True)
    assert all(tensor.is_meta for copied in (twin, dense) for tensor in copied.parameters())
    assert not twin.training and type(twin) is type(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == shapes
    assert dense.config.structure is None and twin.config.structure == model.config.structure
    full = {name: list(tensor.shape) for name, tensor in dense.model.state_dict().items()}
    for name, shape in model.config.structure["shapes"].items():
        assert shape != full[name] and all(kept <= size for kept, size in zip(shape, full[name], strict=True))
    assert model.config.to_dict() == before


def test_dense_model_has_empty_structure(tmp_path) -> None:
    base = make_base("vit", tmp_path)
    assert capture_structure(meta_copy(base).model, base.model) == HAND_MADE[0]


def test_model_without_image_size_is_refused(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    assert image_size_of(model) == [3, 16, 16]
    model.config.image_size = None
    with pytest.raises(CheckpointError, match=r"config\.image_size"):
        image_size_of(model)


def test_tensor_that_the_base_lacks_is_recorded() -> None:
    base, pruned = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    pruned.register_buffer("mask", torch.ones(3), persistent=False)
    assert capture_structure(base, pruned)["shapes"] == {"mask": [3]}
