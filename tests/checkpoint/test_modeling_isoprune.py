"""The folder of a pruned model opens bit for bit, in every way that transformers offers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers.folders import (
    HF_VIT,
    HF_VIT_BASE,
    VIT_BASE,
    WITH_PACKAGE,
    assert_same,
    config_of,
    logits,
    tensors,
)
from helpers.fresh_python import FreshPython
from helpers.pruned_models import SAVED
from helpers.tiny_models import VIT
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoImageProcessor,
    IsoPruneConfig,
    IsoPruneForImageClassification,
    build_base,
)
from isoprune_hf.models.processors import with_transform


@pytest.mark.parametrize("family", SAVED)
def test_pruned_model_opens_bit_for_bit(family: str, pruned) -> None:
    sample = pruned(family)
    assert config_of(sample.folder)["structure"]["shapes"]
    for cls in WITH_PACKAGE:
        model = cls.from_pretrained(sample.folder)
        assert type(model) is IsoPruneForImageClassification and not model.training
        assert torch.equal(logits(model, sample.images), sample.logits)
        # Index tables and masks that are not in the file are among these.
        assert_same(tensors(model), tensors(sample.model))


def test_swin_has_buffers_outside_the_file(pruned) -> None:
    for family in ("swin", "hf-swin"):
        sample = pruned(family)
        unsaved = dict(sample.model.named_buffers()).keys() - sample.model.state_dict().keys()
        assert any(name.endswith("relative_position_index") for name in unsaved)
        assert not unsaved & load_file(sample.folder / "model.safetensors").keys()


@pytest.mark.parametrize("family", SAVED)
def test_reopened_model_saves_the_same_folder(family: str, pruned, tmp_path: Path) -> None:
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
def test_file_has_the_tensor_names_of_the_structure(family: str, pruned) -> None:
    sample = pruned(family)
    with safe_open(sample.folder / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes.keys() == sample.model.state_dict().keys()
    structure = config_of(sample.folder)["structure"]
    for name, shape in structure["shapes"].items():
        assert shapes[f"model.{name}"] == shape


def test_sharded_model_opens_bit_for_bit(pruned, tmp_path: Path) -> None:
    sample = pruned("swin")
    sample.model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path), sample.images), sample.logits)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("swin", torch.float16), ("swin", torch.bfloat16), ("resnet", torch.bfloat16), ("hf-swin", torch.float16)],
)
def test_dtype_casts_only_the_weights(family: str, dtype: torch.dtype, pruned) -> None:
    sample = pruned(family)
    model = AutoModelForImageClassification.from_pretrained(sample.folder, dtype=dtype)
    saved = load_file(sample.folder / "model.safetensors")
    assert_same(model.state_dict(), {k: v.to(dtype) if v.is_floating_point() else v for k, v in saved.items()})
    result = logits(model, sample.images)
    assert result.dtype == dtype and result.isfinite().all()
    # The network is some thirty roundings deep.
    error = (result.float() - sample.logits).norm() / sample.logits.norm()
    assert error < 100 * torch.finfo(dtype).eps


def test_folder_saved_in_bfloat16_opens_in_bfloat16(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    half = copy.deepcopy(sample.model).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert config_of(tmp_path)["dtype"] == "bfloat16"
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model, sample.images), logits(half, sample.images))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("swin", {"device_map": "cpu"}),
        ("hf-vit", {"device_map": {"": "cpu"}}),
        ("hf-vit", {"low_cpu_mem_usage": True}),
    ],
)
def test_placement_options_open_the_same_model(family: str, options: dict[str, Any], pruned) -> None:
    sample = pruned(family)
    model = AutoModelForImageClassification.from_pretrained(sample.folder, **options)
    assert_same(tensors(model), tensors(sample.model))
    assert torch.equal(logits(model, sample.images), sample.logits)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "hf-swin"])
def test_reopened_model_copies_and_trains(family: str, pruned) -> None:
    sample = pruned(family)
    model = AutoModelForImageClassification.from_pretrained(sample.folder)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, sample.images), sample.logits)
    twin.train()(sample.images, labels=torch.tensor([1, 3])).loss.backward()
    assert [name for name, p in twin.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_opening_does_not_change_the_random_state(pruned) -> None:
    folder = pruned("swin").folder
    before = torch.get_rng_state()
    AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_keeps_the_initial_weights_of_the_library() -> None:
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


def test_logits_and_loss_match_the_inner_model(pruned) -> None:
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


def test_images_are_cast_to_the_model_dtype(pruned) -> None:
    sample = pruned("vit")
    assert torch.equal(logits(sample.model, sample.images.double()), sample.logits)


def test_list_argument_reaches_builder_as_tuple() -> None:
    args = {"img_size": [16, 24], "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = build_base(IsoPruneConfig(base={**VIT_BASE, "args": args}, num_labels=3))
    assert model.patch_embed.img_size == (16, 24)
    assert model.pos_embed.shape == (1, 1 + 4 * 6, 32)


def test_config_round_trip_keeps_all_fields(tmp_path: Path) -> None:
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


def test_crop_rounds_half_to_even() -> None:
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


def test_own_processor_opens_with_transformers_base(pruned, fresh_python: FreshPython, tmp_path: Path) -> None:
    sample = pruned("hf-vit")
    save_model_folder(tmp_path / "own", sample.model, with_transform(sample.processor, resize=20))
    save_model_folder(tmp_path / "stock", sample.model, sample.processor)
    code = """
import sys
from transformers import AutoImageProcessor
for folder in sys.argv[1:]:
    print(type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__)
"""
    done = fresh_python.run(code, tmp_path / "own", tmp_path / "stock", absent=["isoprune_hf"])
    assert done.stdout.split() == ["IsoImageProcessor", type(sample.processor).__name__], done.stderr


def test_opened_tensors_are_aligned_like_allocated_ones(pruned) -> None:
    # A file maps them to any address; on full-size models unaligned ones gave other last bits.
    model = IsoPruneForImageClassification.from_pretrained(pruned("vit").folder)
    assert {tensor.data_ptr() % 64 for tensor in (*model.parameters(), *model.buffers())} == {0}


def test_shared_tensors_are_saved_once_and_stay_shared(tmp_path: Path) -> None:
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
