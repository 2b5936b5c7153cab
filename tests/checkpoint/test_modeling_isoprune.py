"""The folder opens bit for bit, in every way transformers offers; a damaged or hostile one is refused by name."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers.pruned_models import SAVED
from helpers.tiny_models import VIT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoImageProcessor,
    IsoPruneConfig,
    IsoPruneForImageClassification,
    apply_structure,
    build_base,
)
from isoprune_hf.errors import CheckpointError

WITH_PACKAGE = (IsoPruneForImageClassification, AutoModelForImageClassification)
VIT_BASE = {"library": "timm", "architecture": "vit_tiny_patch16_224", "args": VIT}
HF_VIT = ViTConfig(
    image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
HF_VIT_BASE = {"library": "transformers", "config": HF_VIT.to_diff_dict() | {"model_type": "vit"}}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# --- the folder opens bit for bit


@pytest.mark.parametrize("family", SAVED)
def test_a_pruned_model_opens_bit_for_bit_with_the_class_and_with_the_auto_class(family: str, pruned) -> None:
    sample = pruned(family)
    assert config_of(sample.folder)["structure"]["shapes"]
    for cls in WITH_PACKAGE:
        model = cls.from_pretrained(sample.folder)
        assert type(model) is IsoPruneForImageClassification and not model.training
        assert torch.equal(logits(model, sample.images), sample.logits)
        # Index tables and masks that are not in the file are among these.
        assert_same(tensors(model), tensors(sample.model))


def test_swin_has_buffers_that_are_not_in_the_file(pruned) -> None:
    for family in ("swin", "hf-swin"):
        sample = pruned(family)
        unsaved = dict(sample.model.named_buffers()).keys() - sample.model.state_dict().keys()
        assert any(name.endswith("relative_position_index") for name in unsaved)
        assert not unsaved & load_file(sample.folder / "model.safetensors").keys()


@pytest.mark.parametrize("family", SAVED)
def test_a_reopened_model_saves_the_same_folder_again(family: str, pruned, tmp_path: Path) -> None:
    sample = pruned(family)
    AutoModelForImageClassification.from_pretrained(sample.folder).save_pretrained(tmp_path / "again")
    unstable = {"_name_or_path", "transformers_version"}
    first, again = (
        {k: v for k, v in config_of(f).items() if k not in unstable} for f in (sample.folder, tmp_path / "again")
    )
    assert again == first
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), load_file(sample.folder / "model.safetensors"))
    code = (tmp_path / "again" / "modeling_isoprune.py").read_bytes()
    assert code == (sample.folder / "modeling_isoprune.py").read_bytes()


@pytest.mark.parametrize("family", SAVED)
def test_the_file_holds_the_module_names_that_the_structure_speaks_of(family: str, pruned) -> None:
    sample = pruned(family)
    with safe_open(sample.folder / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes.keys() == sample.model.state_dict().keys()
    structure = config_of(sample.folder)["structure"]
    for name, shape in structure["shapes"].items():
        assert shapes[f"model.{name}"] == shape


def test_a_model_that_is_saved_in_shards_opens_bit_for_bit(pruned, tmp_path: Path) -> None:
    sample = pruned("swin")
    sample.model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path), sample.images), sample.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["swin", "resnet", "hf-swin"])
def test_a_dtype_casts_the_weights_and_nothing_else(family: str, dtype: torch.dtype, pruned) -> None:
    sample = pruned(family)
    model = AutoModelForImageClassification.from_pretrained(sample.folder, dtype=dtype)
    saved = load_file(sample.folder / "model.safetensors")
    assert_same(model.state_dict(), {k: v.to(dtype) if v.is_floating_point() else v for k, v in saved.items()})
    result = logits(model, sample.images)
    assert result.dtype == dtype and result.isfinite().all()
    # The network is some thirty roundings deep.
    error = (result.float() - sample.logits).norm() / sample.logits.norm()
    assert error < 100 * torch.finfo(dtype).eps


def test_a_folder_saved_in_bfloat16_opens_in_bfloat16(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    half = copy.deepcopy(sample.model).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert config_of(tmp_path)["dtype"] == "bfloat16"
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model, sample.images), logits(half, sample.images))


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
@pytest.mark.parametrize("family", ["swin", "hf-vit"])
def test_placement_options_open_the_same_model(family: str, options: dict[str, Any], pruned) -> None:
    sample = pruned(family)
    model = AutoModelForImageClassification.from_pretrained(sample.folder, **options)
    assert_same(tensors(model), tensors(sample.model))
    assert torch.equal(logits(model, sample.images), sample.logits)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "hf-swin"])
def test_a_reopened_model_copies_and_trains(family: str, pruned) -> None:
    sample = pruned(family)
    model = AutoModelForImageClassification.from_pretrained(sample.folder)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, sample.images), sample.logits)
    twin.train()(sample.images, labels=torch.tensor([1, 3])).loss.backward()
    assert [name for name, p in twin.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_opening_leaves_the_callers_random_state_alone(pruned) -> None:
    folder = pruned("swin").folder
    before = torch.get_rng_state()
    AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


# --- the class


def test_building_the_class_on_a_device_keeps_the_weights_the_library_draws() -> None:
    def drawn(base: dict[str, Any], labels: int = 3) -> nn.Module:
        torch.manual_seed(5)
        return IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=labels)).model

    torch.manual_seed(5)
    expected = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **VIT)
    assert_same(tensors(drawn(VIT_BASE)), tensors(expected))
    torch.manual_seed(5)
    expected = torchvision.models.mobilenet_v2(weights=None, num_classes=3, width_mult=0.25)
    base = {"library": "torchvision", "architecture": "mobilenet_v2", "args": {"width_mult": 0.25}}
    assert_same(tensors(drawn(base)), tensors(expected))
    torch.manual_seed(5)
    expected = ViTForImageClassification(ViTConfig(**HF_VIT.to_diff_dict(), num_labels=3))
    assert_same(tensors(drawn(HF_VIT_BASE)), tensors(expected))


def test_logits_and_loss_are_those_of_the_inner_model(pruned) -> None:
    sample = pruned("vit")
    labels = torch.tensor([4, 0])
    with torch.no_grad():
        inner = sample.model.model(sample.images)
        output = sample.model(sample.images, labels=labels)
        pair = sample.model(sample.images, labels=labels, return_dict=False)
        single = sample.model(sample.images, return_dict=False)
    by_hand = -(inner.softmax(-1)[0, 4].log() + inner.softmax(-1)[1, 0].log()) / 2
    assert torch.equal(output.logits, inner)
    assert output.loss.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert len(pair) == 2 and torch.equal(pair[0], output.loss) and torch.equal(pair[1], inner)
    assert len(single) == 1 and torch.equal(single[0], inner)
    assert sample.model(sample.images).loss is None


def test_images_of_another_dtype_are_cast_to_the_models(pruned) -> None:
    sample = pruned("vit")
    assert torch.equal(logits(sample.model, sample.images.double()), sample.logits)


def test_a_list_in_the_arguments_reaches_the_builder_as_a_tuple() -> None:
    args = {"img_size": [16, 24], "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = build_base(IsoPruneConfig(base={**VIT_BASE, "args": args}, num_labels=3))
    assert model.patch_embed.img_size == (16, 24)
    assert model.pos_embed.shape == (1, 1 + 4 * 6, 32)


def test_the_config_is_saved_and_read_with_all_its_fields(tmp_path: Path) -> None:
    fields = {
        "base": VIT_BASE,
        "source": {"name": "timm/x", "seed": 3},
        "structure": {"shapes": {"a": [1, 2]}, "attributes": {"b": {"scale": 0.5}}, "removed": []},
        "image_size": [3, 16, 16],
        "cost": {"base": {"macs": 2, "params": 1}},
        "recipe": {"prune": {"ratio": 0.5}},
        "stage": "finetuned",
    }
    IsoPruneConfig(**fields, id2label={0: "cat", 1: "dog", 2: "owl"}).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is IsoPruneConfig
    assert {name: getattr(config, name) for name in fields} == fields
    assert (config.format_version, config.num_labels, config.id2label[2]) == (1, 3, "owl")


# --- damaged and hostile folders


@pytest.fixture
def edited(pruned, tmp_path: Path) -> Callable[..., Path]:
    """Give a copy of a pruned folder whose config.json was changed in place by a function."""

    def give(edit: Callable[[dict[str, Any]], Any] = lambda config: None, family: str = "vit") -> Path:
        folder = give.folder = tmp_path / "edited"
        shutil.copytree(pruned(family).folder, folder)
        config = config_of(folder)
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return give


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        AutoModelForImageClassification.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_copied_folder_opens(edited, pruned) -> None:
    model = AutoModelForImageClassification.from_pretrained(edited())
    assert torch.equal(logits(model, pruned("vit").images), pruned("vit").logits)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.mlp.fc1.bias", [129]),  # the base has 4 x 32 = 128
        ("blocks.0.mlp.fc1.weight", [128, 33]),
        ("blocks.0.mlp.fc1.bias", [10**12]),
        ("blocks.0.mlp.fc1.weight", [10**9, 10**9]),
        ("blocks.0.mlp.fc1.bias", [0]),
        ("blocks.0.mlp.fc1.bias", [-1]),
        ("blocks.0.mlp.fc1.bias", [True]),
        ("blocks.0.mlp.fc1.bias", [100.0]),
        ("blocks.0.mlp.fc1.bias", ["100"]),
        ("blocks.0.mlp.fc1.bias", [None]),
        ("blocks.0.mlp.fc1.bias", [[100]]),
        ("blocks.0.mlp.fc1.bias", []),
        ("blocks.0.mlp.fc1.bias", [100, 1]),
        ("blocks.0.mlp.fc1.weight", [100]),
        ("blocks.0.mlp.fc1.bias", "100"),
        ("blocks.0.mlp.fc1.bias", 100),
        ("blocks.0.mlp.fc1.bias", None),
        ("blocks.0.mlp.fc1.bias", {"0": 100}),
        ("blocks.0.mlp.fc9.bias", [1]),
        ("blocks.9.mlp.fc1.bias", [1]),
        ("model.blocks.0.mlp.fc1.bias", [1]),
        ("", [1]),
        ("forward", [1]),
    ],
)
def test_a_shape_that_the_base_cannot_give_is_refused(name: str, shape: Any, edited) -> None:
    folder = edited(lambda config: config["structure"]["shapes"].update({name: shape}))
    assert refused(folder).startswith(f"config.structure.shapes[{name!r}]: ")


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("blocks.0.mlp.fc1", "nosuch", 1),
        ("blocks.0.mlp.fc1", "_parameters", 1),
        ("blocks.0.mlp.fc1", "_modules", {}),
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
        ("blocks.0.mlp.fc1", "in_features", {"a": 1}),
        ("blocks.0.mlp.fc1", "in_features", 0),
        ("blocks.0.mlp.fc1", "in_features", -16),
        ("blocks.0.mlp.fc1", "in_features", 33),
        ("blocks.0.mlp.fc1", "in_features", 10**12),
        ("blocks.0.norm1", "normalized_shape", [33]),
        ("blocks.0.norm1", "normalized_shape", [16, 2]),
        ("blocks.0.norm1", "normalized_shape", [True]),
        ("blocks.0.norm1", "normalized_shape", ["16"]),
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
def test_an_attribute_that_the_base_cannot_have_is_refused(path: str, name: str, value: Any, edited) -> None:
    folder = edited(lambda config: config["structure"]["attributes"].setdefault(path, {}).update({name: value}))
    assert refused(folder).startswith(f"config.structure.attributes[{path!r}][{name!r}]: ")


@pytest.mark.parametrize(
    ("path", "entries"),
    [("nosuch", {"a": 1}), ("blocks.9", {}), ("blocks.0", []), ("blocks.0", 1), ("blocks.0", None)],
)
def test_attributes_of_no_module_of_the_base_are_refused(path: str, entries: Any, edited) -> None:
    folder = edited(lambda config: config["structure"]["attributes"].update({path: entries}))
    assert refused(folder).startswith(f"config.structure.attributes[{path!r}]: ")


@pytest.mark.parametrize(
    "removed", [["nosuch"], [""], ["blocks.0", "blocks.9"], [1], [None], [["blocks.0"]], [{}], "blocks.0", {"a": 1}, 3]
)
def test_removed_modules_that_the_base_has_not_are_refused(removed: Any, edited) -> None:
    folder = edited(lambda config: config["structure"].update(removed=removed))
    assert refused(folder).startswith("config.structure")


def test_a_removed_module_inside_a_removed_module_is_refused(edited) -> None:
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
def test_a_structure_of_another_form_is_refused(structure: Any, edited) -> None:
    folder = edited(lambda config: config.update(structure=structure))
    assert refused(folder).startswith("config.structure: ")


@pytest.mark.parametrize("version", [2, 10**9, "1", 0, -1, None, True, 1.0, [1]])
def test_another_format_version_is_refused(version: Any, edited) -> None:
    folder = edited(lambda config: config.update(format_version=version))
    assert refused(folder).startswith(f"config.format_version: {version!r} ")


@pytest.mark.parametrize("dtype", [False, True, "", [], {}, 0, "int64", "float8_e4m3fn", "nn", "torch.float32"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_type_that_weights_cannot_have_is_refused(name: str, dtype: Any, edited) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["dtype"]
        config[name] = dtype

    assert refused(edited(change)).startswith(f"config.dtype: {dtype!r} ")


@pytest.mark.parametrize("library", ["keras", "os", None, 1, ["timm"], {"timm": 1}])
def test_an_unknown_library_is_refused(library: Any, edited) -> None:
    message = refused(edited(lambda config: config["base"].update(library=library)))
    assert message.startswith("config.base: library must be timm, torchvision or transformers")


@pytest.mark.parametrize("base", [None, "timm", ["timm"], {}, 1])
def test_a_base_of_another_form_is_refused(base: Any, edited) -> None:
    assert refused(edited(lambda config: config.update(base=base))).startswith("config.base: ")


@pytest.mark.parametrize(
    ("library", "architecture"),
    [
        ("timm", "nosuch_model"),
        ("timm", "hf-hub:someone/model"),
        ("timm", "local-dir:/etc"),
        ("timm", ""),
        ("torchvision", "nosuch_model"),
        ("torchvision", "fasterrcnn_resnet50_fpn"),
        ("torchvision", "quantized_mobilenet_v2"),
    ],
)
def test_an_unknown_architecture_is_refused(library: str, architecture: str, edited) -> None:
    message = refused(edited(lambda config: config["base"].update(library=library, architecture=architecture)))
    assert message.startswith("config.base.architecture: ") and repr(architecture) in message


@pytest.mark.parametrize("architecture", [None, 1, ["resnet18"]])
def test_an_architecture_that_is_no_string_is_refused(architecture: Any, edited) -> None:
    assert refused(edited(lambda config: config["base"].update(architecture=architecture))).startswith("config.base: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretrained", True),
        ("pretrained", False),
        ("checkpoint_path", "weights.pth"),
        ("cache_dir", "weights"),
        ("pretrained_cfg", "x"),
        ("pretrained_cfg_overlay", {"file": "weights.pth"}),
        ("features_only", True),
        ("scriptable", True),
        ("num_classes", 7),
        ("weights", "DEFAULT"),
        ("weights_backbone", "DEFAULT"),
        ("block_args", {"a": {"b": 1}}),
        ("block_args", [{"a": 1}]),
    ],
)
def test_an_argument_that_reads_files_or_is_nested_is_refused(name: str, value: Any, edited) -> None:
    folder = edited(lambda config: config["base"]["args"].update({name: value}))
    assert refused(folder) == f"config.base.args: {name}={value!r} is not allowed"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nosuch_argument", 1),
        ("embed_dim", -1),
        ("embed_dim", "32"),
        ("embed_dim", 30.5),
        ("num_heads", 5),
        ("num_heads", 0),
        ("patch_size", 0),
        ("act_layer", "nosuch"),
        ("norm_layer", "nosuch"),
        ("drop_path_rate", "x"),
        ("model_name", "resnet18"),
    ],
)
def test_an_argument_that_the_builder_does_not_take_is_refused(name: str, value: Any, edited) -> None:
    message = refused(edited(lambda config: config["base"]["args"].update({name: value})))
    assert message.startswith("config.base: vit_tiny_patch16_224 with {") and f"{name!r}: {value!r}" in message


@pytest.mark.parametrize("args", ["x", [1], 1])
def test_arguments_that_are_no_mapping_are_refused(args: Any, edited) -> None:
    assert refused(edited(lambda config: config["base"].update(args=args))).startswith("config.base: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "bert"},
        {"model_type": "detr"},
        {"model_type": "nosuch"},
        {"model_type": None},
        {"model_type": ["vit"]},
        {"model_type": "timm_wrapper", "architecture": "resnet18"},
        {"model_type": "isoprune", "base": VIT_BASE},
        {"hidden_size": "32"},
        {"hidden_act": "nosuch"},
        {"num_attention_heads": 0},
        {"patch_size": 0},
        {"architectures": 5},
        {"architectures": [["ViTForImageClassification"]]},
    ],
)
def test_a_transformers_config_that_builds_no_image_classifier_is_refused(changes: dict, edited) -> None:
    folder = edited(lambda config: config["base"]["config"].update(changes), family="hf-vit")
    assert refused(folder).startswith("config.base.config: ")


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_kernel_that_a_config_names_is_not_fetched(name: str, edited, pruned) -> None:
    folder = edited(lambda config: config["base"]["config"].update({name: "someone/kernel"}), family="hf-vit")
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, pruned("hf-vit").images), pruned("hf-vit").logits)


@pytest.mark.parametrize("values", [None, [], "vit", 3])
def test_a_transformers_config_of_another_form_is_refused(values: Any, edited) -> None:
    folder = edited(lambda config: config["base"].update(config=values), family="hf-vit")
    assert refused(folder).startswith("config.base.config: ")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["vit", "hf-vit", "resnet"])
def test_a_tensor_that_is_not_in_the_file_is_refused(family: str, edited) -> None:
    folder = edited(family=family)
    names = sorted(load_file(folder / "model.safetensors"))
    for name in (names[0], names[-1]):
        edit_weights(folder, lambda weights, name=name: weights.pop(name))
        assert refused(folder).startswith(f"tensor {names[0]!r}: ")


@pytest.mark.parametrize("name", ["extra", "model.blocks.0.mlp.fc3.weight", "head.weight"])
def test_a_tensor_too_many_is_refused(name: str, edited) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(2)}))
    assert refused(folder).startswith(f"tensor {name!r}: ")


def test_a_tensor_of_another_shape_is_refused(edited) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({"model.head.weight": torch.zeros(7, 33)}))
    kept = config_of(folder)["structure"]["shapes"]["head.weight"]
    message = refused(folder)
    assert message.startswith("tensor 'model.head.weight': ") and "[7, 33]" in message and str(kept) in message


def test_a_shape_that_the_file_does_not_have_is_refused(edited) -> None:
    folder = edited(lambda config: config["structure"]["shapes"].update({"blocks.0.mlp.fc1.bias": [1]}))
    stored = list(load_file(folder / "model.safetensors")["model.blocks.0.mlp.fc1.bias"].shape)
    message = refused(folder)
    assert message.startswith("tensor 'model.blocks.0.mlp.fc1.bias': ") and str(stored) in message and "[1]" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-40],
        lambda content: content[: len(content) // 2],
        lambda content: content[:20],
        lambda content: b"",
        lambda content: b"no safetensors at all, only text" * 9,
        lambda content: (2**62).to_bytes(8, "little") + content[8:],
        lambda content: bytes(len(content)),
    ],
    ids=["without its end", "halved", "header cut", "empty", "text", "huge header", "zeros"],
)
@pytest.mark.parametrize("with_dtype", [True, False], ids=["dtype in config", "no dtype in config"])
def test_a_damaged_file_is_refused(with_dtype: bool, damage: Callable[[bytes], bytes], edited) -> None:
    folder = edited(lambda config: None if with_dtype else config.pop("dtype"))
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert refused(folder).startswith("model.safetensors: not a readable safetensors file (")


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
)
def test_a_weight_that_is_no_float_is_refused(dtype: torch.dtype, edited) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({"model.head.bias": weights["model.head.bias"].to(dtype)}))
    assert re.match(r"tensor 'model\.head\.bias': .* \[7\] of .*, .* \[7\] of floats$", refused(folder))


def test_a_counter_that_is_no_integer_is_refused(edited) -> None:
    folder = edited(family="resnet")
    name = "model.bn1.num_batches_tracked"
    edit_weights(folder, lambda weights: weights.update({name: weights[name].float()}))
    assert (
        refused(folder) == f"tensor {name!r}: the checkpoint has [] of floats, the config requires [] of torch.int64"
    )


def test_weights_of_twice_the_width_open(edited, pruned) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({name: w.double() for name, w in weights.items()}))
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(model, pruned("vit").images), pruned("vit").logits)


def shard(folder: Path, index: Any) -> None:
    """Put the weights beside the folder, and an index into it."""
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    if not isinstance(index, str):
        index = json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(index)


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
def test_an_index_that_is_damaged_or_points_elsewhere_is_refused(index: Any, edited) -> None:
    folder = edited()
    shard(folder, index)
    assert re.match(r"model\.safetensors\.index\.json: |.*: no such file in ", refused(folder))


def test_an_index_that_points_to_a_whole_path_is_refused(edited) -> None:
    folder = edited()
    shard(folder, {"metadata": {}, "weight_map": {"model.head.bias": str(folder.parent / "outside.safetensors")}})
    assert ": no such file in " in refused(folder)


def test_a_folder_without_weights_is_refused(edited) -> None:
    folder = edited()
    (folder / "model.safetensors").unlink()
    assert refused(folder).startswith("'model.safetensors': no such file in ")
    (folder / "model.safetensors").mkdir()
    assert refused(folder).startswith("'model.safetensors': no such file in ")


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
def test_a_structure_that_does_not_run_is_refused_before_anything_is_allocated(
    family: str, edit: Callable, edited, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reached = edited(edit, family=family), []
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *_: reached.append(1))
    assert refused(folder).startswith("config.image_size: the model does not run on ")
    assert reached == []


@pytest.mark.parametrize("part", ["shapes", "attributes", "removed"])
@pytest.mark.parametrize("value", ["", 0, False, "other"])
def test_a_part_of_a_structure_that_is_empty_but_of_another_form_is_refused(part: str, value: Any, edited) -> None:
    value = ([] if part != "removed" else {}) if value == "other" else value
    folder = edited(lambda config: config["structure"].update({part: value}))
    assert refused(folder).startswith("config.structure: shapes and attributes ")


@pytest.mark.parametrize("structure", ["", 0, False, []])
def test_a_structure_that_is_empty_but_no_mapping_is_refused(structure: Any, edited) -> None:
    assert refused(edited(lambda config: config.update(structure=structure))).startswith("config.structure: ")


@pytest.mark.parametrize(
    "path", ["bl\u00f6cke.0", "\u202eblocks.0", "blocks.0\n", "blocks\x00", "blocks..0", "blocks.0.", "."]
)
def test_odd_paths_are_refused_in_one_line(path: str, edited) -> None:
    for part, entry in (("shapes", {path: [1]}), ("attributes", {path: {path: 1}}), ("removed", [path])):
        message = refused(edited(lambda config, p=part, e=entry: config["structure"].update({p: e})))
        assert message.startswith(f"config.structure.{part}") and repr(path) in message
        shutil.rmtree(edited.folder)


class Planted:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}])
@pytest.mark.parametrize("cls", WITH_PACKAGE)
def test_a_pickle_is_never_opened(cls: type, options: dict[str, bool], edited, tmp_path: Path) -> None:
    folder = edited()
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Planted(tmp_path / "sentinel")}, folder / "pytorch_model.bin")
    with pytest.raises((CheckpointError, OSError), match=r"model\.safetensors"):
        cls.from_pretrained(folder, **options)
    assert not (tmp_path / "sentinel").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "sentinel").exists()  # the trap works


def test_a_shard_that_is_a_pickle_is_not_opened(edited, tmp_path: Path) -> None:
    folder = edited()
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Planted(tmp_path / "sentinel")}, folder / "weights.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder).startswith("weights.bin: not a readable safetensors file (")
    assert not (tmp_path / "sentinel").exists()


def test_tensors_that_differ_are_refused_even_if_the_caller_would_take_them(edited) -> None:
    folder = edited()
    edit_weights(folder, lambda weights: weights.update({"model.head.weight": torch.zeros(7, 33)}))
    for options in ({"ignore_mismatched_sizes": True}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}):
        with pytest.raises(CheckpointError, match=r"^tensor 'model\.head\.weight': "):
            AutoModelForImageClassification.from_pretrained(folder, **options)


def test_a_claim_of_terabytes_is_refused_before_anything_is_allocated(edited, monkeypatch: pytest.MonkeyPatch) -> None:
    # 10^6 wide, two blocks: 24 x 10^12 weights. On the meta device they cost nothing.
    folder = edited(
        lambda config: config.update(structure=None, base={**VIT_BASE, "args": {**VIT, "embed_dim": 10**6}})
    )
    reached = []
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *_: reached.append(1))
    assert refused(folder).startswith("tensor ")
    assert reached == []


def test_a_structure_can_be_put_on_a_base_of_the_meta_device_only_if_it_fits() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(10**7, 10**7))  # 400 TB
    with pytest.raises(CheckpointError, match=r"shapes\['0\.bias'\]: \[10000001\] .* \[10000000\]"):
        apply_structure(base, {"shapes": {"0.bias": [10**7 + 1]}})
    apply_structure(base, {"shapes": {"0.bias": [10**7 - 1]}})
    assert base[0].bias.shape == (10**7 - 1,) and base[0].bias.is_meta


# --- the image processor


def test_the_crop_rounds_half_to_even() -> None:
    processor = IsoImageProcessor(
        size={"shortest_edge": 9}, crop_size={"height": 4, "width": 4}, do_normalize=False, do_rescale=False
    )
    column = torch.arange(9, dtype=torch.uint8)[None, :, None].expand(3, 9, 9)
    # (9 - 4) / 2 = 2.5 -> 2, and with one row more 3 -> 3; floor(x + 0.5) would give 3 and 3.
    assert processor(column, return_tensors="pt").pixel_values[0, 0, :, 0].tolist() == [2, 3, 4, 5]
    processor = IsoImageProcessor(
        size={"shortest_edge": 11}, crop_size={"height": 4, "width": 4}, do_normalize=False, do_rescale=False
    )
    column = torch.arange(11, dtype=torch.uint8)[None, :, None].expand(3, 11, 11)
    # (11 - 4) / 2 = 3.5 -> 4; floor would give 3.
    assert processor(column, return_tensors="pt").pixel_values[0, 0, :, 0].tolist() == [4, 5, 6, 7]


def test_opened_tensors_are_aligned_as_torch_allocates_so_that_kernels_round_alike(pruned) -> None:
    # A file maps them to any address; on full-size models unaligned ones gave other last bits.
    model = IsoPruneForImageClassification.from_pretrained(pruned("vit").folder)
    assert {tensor.data_ptr() % 64 for tensor in (*model.parameters(), *model.buffers())} == {0}


def test_tensors_that_a_base_shares_are_saved_once_and_stay_shared(tmp_path: Path) -> None:
    args = {
        "img_size": 32,
        "embed_dims": [32] * 4,
        "serial_depths": [1] * 4,
        "parallel_depth": 1,
        "mlp_ratios": [1] * 4,
    }
    base = {"library": "timm", "architecture": "coat_tiny", "args": args}
    model = IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=3, image_size=[3, 32, 32])).eval()
    model.save_pretrained(tmp_path)
    names = [*model.state_dict()]
    saved = [*load_file(tmp_path / "model.safetensors")]
    assert len(saved) == len({id(parameter) for parameter in model.parameters()}) < len(names)
    again = IsoPruneForImageClassification.from_pretrained(tmp_path)
    assert [*again.state_dict()] == names and len([*again.parameters()]) == len(saved)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(again, images), logits(model, images))
