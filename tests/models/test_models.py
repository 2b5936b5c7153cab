"""A base opens with its library's weights and the pixels of its evaluation; a wrong name is said in one line."""

import json
import re
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from helpers.tiny_models import SWIN, TRANSFORMERS, VIT
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BitImageProcessor,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    DeiTForImageClassificationWithTeacher,
    ResNetForImageClassification,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
)

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.models.processors import torchvision_processor

TINY = "timm/vit_tiny_patch16_224"
CLASSES = {
    "hf-vit": ViTForImageClassification,
    "hf-deit": DeiTForImageClassificationWithTeacher,
    "hf-swin": SwinForImageClassification,
    "hf-convnext": ConvNextForImageClassification,
    "hf-resnet": ResNetForImageClassification,
}


def tiny(**options: Any) -> BaseModel:
    return load_base(options.pop("name", TINY), False, model_args=VIT, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def seeded_images(base: BaseModel) -> torch.Tensor:
    return torch.randn(2, *base.model.config.image_size, generator=torch.Generator().manual_seed(1))


def output_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


# --- timm


ENCODER = "timm/vit_small_patch14_dinov2"
SMALL = {"img_size": 28, "embed_dim": 32, "depth": 1, "num_heads": 2}


def test_an_encoder_of_timm_is_given_the_head_that_is_asked_for(tmp_path: Path) -> None:
    base = load_base(ENCODER, False, model_args=SMALL, num_labels=3, label_names=("ant", "bee", "cat"))
    assert base.model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert output_of(base.model, seeded_images(base)).shape == (2, 3)
    source = base.model.config.source
    assert source["num_labels"] == 3
    again = load_base(source["name"], source["pretrained"], model_args=SMALL, num_labels=3, seed=source["seed"])
    assert_same(weights(base.model.model), weights(again.model.model))
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    assert_same(weights(load_base(str(tmp_path / "dense")).model), weights(base.model))


def test_an_image_size_that_was_never_trained_needs_no_border() -> None:
    base = load_base("timm/deepseek_vit_412m", False, model_args={"img_size": 28, "depth": 1}, num_labels=3)
    pixels = base.processor(Image.new("RGB", (50, 37)), return_tensors="pt").pixel_values
    assert list(pixels.shape[1:]) == base.model.config.image_size == [3, 28, 28]


def test_an_encoder_of_timm_without_a_head_is_refused_with_the_way_out() -> None:
    with pytest.raises(RecipeError, match=r"--prune\.num_labels"):
        load_base(ENCODER, False, model_args=SMALL)
    with pytest.raises(RecipeError, match=r"prune\.num_labels is 3, but 2 names were given"):
        load_base(ENCODER, False, model_args=SMALL, num_labels=3, label_names=("ant", "bee"))


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
def test_a_timm_name_draws_exactly_what_timm_draws(name: str, architecture: str, args: dict[str, Any]) -> None:
    base = load_base(name, False, model_args=args, seed=11)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        expected = timm.create_model(architecture, pretrained=False, **args).eval()
    assert type(base.model.model) is type(expected)
    assert_same(weights(base.model.model), weights(expected))
    images = torch.randn(2, *(base.model.config.image_size if args else (3, 64, 64)))
    assert torch.equal(output_of(base.model, images), output_of(expected, images))
    assert base.model.config.base["library"] == "timm" and base.model.config.base["args"] == args
    assert base.model.config.base["architecture"].partition(".")[0] == architecture
    assert base.model.config.source == {"name": name, "pretrained": False, "seed": 11, "model_args": args}
    assert (base.model.config.stage, base.model.config.structure) == ("base", None)
    assert not base.model.training and all(parameter.requires_grad for parameter in base.model.parameters())


def test_a_seed_decides_the_weights_and_the_callers_random_state_is_left_alone() -> None:
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
def test_a_new_head_changes_the_head_alone(name: str, args: dict[str, Any]) -> None:
    whole = load_base(name, False, model_args=args, seed=2).model
    headed = load_base(name, False, model_args=args, seed=2, num_labels=6).model
    assert headed.config.num_labels == 6 and headed.config.source["num_labels"] == 6
    before, after = weights(whole.model), weights(headed.model)
    changed = {key for key in before if before[key].shape != after[key].shape}
    assert changed in ({"head.weight", "head.bias"}, {"classifier.1.weight", "classifier.1.bias"})
    assert_same(*({k: v for k, v in part.items() if k not in changed} for part in (before, after)))
    head = after["head.weight" if "head.weight" in changed else "classifier.1.weight"]
    assert head.shape[0] == 6 and head.unique().numel() > 6
    assert not headed.training


def test_a_network_that_asks_for_the_version_of_its_state_gets_a_new_head() -> None:
    whole = load_base("torchvision/mnasnet0_5", False, seed=2).model
    headed = load_base("torchvision/mnasnet0_5", False, seed=2, num_labels=6).model
    assert headed.model.classifier[1].weight.shape == (6, 1280)
    assert torch.equal(headed.model.layers[0].weight, whole.model.layers[0].weight)


def test_the_same_number_of_labels_keeps_the_trained_head(tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    kept = load_base(str(folder), num_labels=4)
    assert_same(weights(kept.model), weights(load_base(str(folder)).model))
    assert kept.model.config.id2label == {0: "ant", 1: "bee", 2: "cat", 3: "dog"}


def test_the_labels_of_a_base_are_its_own_and_those_of_a_new_head_are_given() -> None:
    names = tiny().model.config.id2label
    # The spelling of the image classifiers of transformers.
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[1] == "goldfish, Carassius auratus"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    names = load_base("torchvision/mobilenet_v2", False).model.config.id2label
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")
    config = tiny(num_labels=3, label_names=("cat", "dog", "owl")).model.config
    assert config.id2label == {0: "cat", 1: "dog", 2: "owl"} and config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    config = tiny(num_labels=3).model.config
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_as_many_names_as_labels_must_be_given() -> None:
    with pytest.raises(RecipeError, match="num_labels"):
        tiny(num_labels=3, label_names=("cat", "dog"))


PIXELS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8, "interpolation": "bilinear"}


def save_timm(folder: Path, **pixels: Any) -> Path:
    """Write a folder as timm reads it."""
    torch.manual_seed(8)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    path = folder / "timm-folder"
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "label_names": ["ant", "bee", "cat", "dog"]}
    config |= {"model_args": VIT, "pretrained_cfg": {"input_size": (3, 16, 16), "num_classes": 4, **PIXELS, **pixels}}
    (path / "config.json").write_text(json.dumps(config))
    return path


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


def test_a_folder_of_timm_opens_with_its_weights_and_names(tmp_path: Path) -> None:
    assert_opens_as_timm_does(save_timm(tmp_path), tmp_path)


def test_a_folder_that_timm_itself_saved_opens_with_its_weights_and_names(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    labels = {"label_names": ["ant", "bee", "cat", "dog"]}
    timm.models.save_for_hf(model, tmp_path / "timm", model_config=labels, safe_serialization=True)
    assert_opens_as_timm_does(tmp_path / "timm", tmp_path)


@pytest.mark.parametrize("changes", [{}, {"crop_mode": "squash"}, {"crop_pct": 1.0, "interpolation": "box"}])
def test_a_folder_of_timm_opens_with_its_pixels(changes: dict[str, Any], tmp_path: Path) -> None:
    base = load_base(str(save_timm(tmp_path, **changes)))
    data = {"input_size": (3, 16, 16), "crop_mode": "center", **PIXELS, **changes}
    assert largest_difference(base.processor, timm.data.create_transform(**data, is_training=False)) == 0.0


def test_a_folder_of_timm_draws_seeded_weights_when_they_are_not_wanted(tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    drawn = load_base(str(folder), False, seed=5)
    torch.manual_seed(5)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    assert_same(weights(drawn.model.model), weights(expected))


WRAPPED = [
    ("vit_tiny_patch16_224", VIT),
    ("swin_tiny_patch4_window7_224", SWIN),  # index tables and masks that are not in the file
    ("resnet10t", {}),
]


def save_wrapped(folder: Path, name: str, args: dict[str, Any], **entries: Any) -> TimmWrapperForImageClassification:
    """Write a folder as transformers writes a timm model."""
    torch.manual_seed(3)
    labels = {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=name, model_args=args, id2label=labels, num_labels=4, **entries)
    )
    model.save_pretrained(folder)
    return TimmWrapperForImageClassification.from_pretrained(folder)


def drop_entries(folder: Path, *names: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))


@pytest.mark.parametrize("dropped", [(), ("model_type",), ("model_type", "architectures")], ids=len)
@pytest.mark.parametrize(("name", "args"), WRAPPED)
def test_a_folder_that_transformers_wrote_of_a_timm_model_opens_with_its_logits(
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


def test_a_wrapped_folder_with_a_config_of_timm_alone_opens_with_its_logits(tmp_path: Path) -> None:
    expected = save_wrapped(tmp_path, *WRAPPED[0])
    kept = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "model_args": VIT, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    base = load_base(str(tmp_path))
    assert torch.equal(output_of(base.model, seeded_images(base)), output_of(expected, seeded_images(base)))


def test_a_wrapped_folder_keeps_its_pixels_and_its_dtype(tmp_path: Path) -> None:
    data = {"input_size": [3, 16, 16], "crop_mode": "center", **PIXELS}
    model = save_wrapped(tmp_path, *WRAPPED[0], pretrained_cfg=data).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert base.model.dtype == torch.bfloat16
    images = seeded_images(base).to(torch.bfloat16)
    assert torch.equal(output_of(base.model, images), output_of(model, images))
    assert largest_difference(base.processor, timm.data.create_transform(**data, is_training=False)) == 0.0


def test_a_wrapped_folder_draws_seeded_weights_when_they_are_not_wanted(tmp_path: Path) -> None:
    save_wrapped(tmp_path, *WRAPPED[0])
    drawn = load_base(str(tmp_path), False, seed=5)
    torch.manual_seed(5)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    assert_same(weights(drawn.model.model), weights(expected))


def test_a_wrapped_hub_id_opens_from_the_cache_without_a_network(offline: Path, tmp_path: Path) -> None:
    expected = save_wrapped(tmp_path / "wrapped", *WRAPPED[0])
    put_in_cache(offline, "someone/wrapped", tmp_path / "wrapped")
    assert_same(weights(load_base("someone/wrapped").model.model), weights(expected.timm_model))


def test_a_wrapped_folder_with_a_tensor_short_is_refused(tmp_path: Path) -> None:
    save_wrapped(tmp_path, *WRAPPED[0])
    stored = load_file(tmp_path / "model.safetensors")
    del stored["timm_model.head.bias"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "timm_model.head.bias" in refused(str(tmp_path))


# --- torchvision


def test_a_torchvision_name_draws_exactly_what_torchvision_draws() -> None:
    base = load_base("torchvision/mobilenet_v2", False, model_args={"width_mult": 0.25}, seed=6)
    torch.manual_seed(6)
    expected = torchvision.models.mobilenet_v2(weights=None, width_mult=0.25)
    assert_same(weights(base.model.model), weights(expected))
    assert base.model.config.base == {
        "library": "torchvision",
        "architecture": "mobilenet_v2",
        "args": {"width_mult": 0.25},
    }
    assert base.model.config.image_size == [3, 224, 224]


def test_the_weights_that_torchvision_publishes_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(1)
    published = torchvision.models.squeezenet1_1(weights=None)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = Path(torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url).name
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    for name in ("torchvision/squeezenet1_1", "torchvision/squeezenet1_1.IMAGENET1K_V1"):
        base = load_base(name)
        assert_same(weights(base.model.model), weights(published))
        assert base.model.config.source["pretrained"] is True


# --- transformers


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a folder that transformers saved: weights, config with label names, and a processor of its own."""
    root, made = tmp_path_factory.mktemp("transformers"), set()
    processors = {
        "hf-vit": ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5, 0.4, 0.3], resample=3),
        "hf-deit": ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
        "hf-swin": BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),
        "hf-convnext": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, resample=2),
        "hf-resnet": ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.9),
    }

    def give(family: str) -> Path:
        if family not in made:
            torch.manual_seed(4)
            config = type(TRANSFORMERS[family])(
                **{**TRANSFORMERS[family].to_diff_dict(), "id2label": {0: "ant", 1: "bee", 2: "cat"}}
            )
            CLASSES[family](config).save_pretrained(root / family)
            processors[family].save_pretrained(root / family)
            made.add(family)
        return root / family

    return give


@pytest.mark.parametrize("family", CLASSES)
def test_a_transformers_folder_opens_with_the_logits_and_pixels_of_transformers(
    family: str, transformers_folder, tmp_path: Path
) -> None:
    folder = transformers_folder(family)
    base = load_base(str(folder))
    expected = CLASSES[family].from_pretrained(folder)
    assert type(base.model.model) is CLASSES[family]
    images = torch.randn(2, 3, *[{"hf-swin": 56, "hf-convnext": 32, "hf-resnet": 64}.get(family, 16)] * 2)
    assert torch.equal(output_of(base.model, images), output_of(expected, images))
    assert_same(weights(base.model.model), weights(expected))
    assert base.model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    save_model_folder(tmp_path, base.model, base.processor)
    processor, theirs = (AutoImageProcessor.from_pretrained(path) for path in (tmp_path, folder))
    assert type(processor) is type(theirs)
    for image in odd_images():
        rgb = image.convert("RGB")
        assert torch.equal(*(p(rgb, return_tensors="pt").pixel_values for p in (processor, theirs)))


@pytest.mark.parametrize("family", CLASSES)
def test_a_transformers_config_alone_draws_exactly_what_transformers_draws(family: str, tmp_path: Path) -> None:
    TRANSFORMERS[family].save_pretrained(tmp_path)
    base = load_base(str(tmp_path), False, seed=9)
    torch.manual_seed(9)
    expected = CLASSES[family](type(TRANSFORMERS[family]).from_pretrained(tmp_path))
    assert_same(weights(base.model.model), weights(expected))


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("saved", [True, False], ids=["processor saved", "config alone"])
def test_the_processor_of_a_transformers_base_gives_images_of_the_size_of_the_model(
    family: str, saved: bool, transformers_folder, tmp_path: Path
) -> None:
    TRANSFORMERS[family].save_pretrained(tmp_path)
    base = load_base(str(transformers_folder(family) if saved else tmp_path), False)
    for image in (Image.new("RGB", (50, 37)), Image.new("RGB", (300, 400))):
        pixels = base.processor(image, return_tensors="pt").pixel_values
        assert list(pixels.shape[1:]) == base.model.config.image_size
    assert output_of(base.model, pixels).isfinite().all()


TOWER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TEXT = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
# What the configs of some types say otherwise than the others.
OTHER_CONFIGS = {
    "two towers": ("clip", {"vision_config": TOWER, "text_config": TEXT, "num_labels": 3}, 16),
    "a pair of sides": (
        "hiera",
        {
            "image_size": [32, 32],
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
        },
        32,
    ),
    "no names of labels": ("pvt", {"image_size": 64, "depths": [1, 1, 1, 1], "num_labels": 3}, 64),
    "no processor": ("dinov2_with_registers", {**TOWER, "num_labels": 3}, 16),
    "shortest edge": ("convnextv2", {"image_size": 32, "depths": [1] * 4, "hidden_sizes": [8] * 4}, 32),
    "another name for logits": ("pp_lcnet", {"scale": 0.25, "num_labels": 3}, 224),
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_a_config_alone_opens_a_model_and_the_processor_of_its_size(name: str, tmp_path: Path) -> None:
    kind, options, side = OTHER_CONFIGS[name]
    config = transformers.CONFIG_MAPPING[kind](**options)
    config.save_pretrained(tmp_path / "config")
    base = load_base(str(tmp_path / "config"), False)
    assert base.model.config.image_size == [3, side, side]
    assert base.model.config.num_labels == config.num_labels
    pixels = base.processor(Image.new("RGB", (side + 9, side + 9)), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = base.model(pixels).logits
    assert logits.shape == (1, config.num_labels)
    save_model_folder(tmp_path / "saved", base.model, base.processor)
    with torch.no_grad():
        assert torch.equal(load_base(str(tmp_path / "saved")).model(pixels).logits, logits)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("imagegpt", {"n_embd": 8, "n_layer": 1, "n_head": 1}, UnsupportedArchitectureError, "reads tokens"),
        (
            "siglip2",
            {"vision_config": {**TOWER, "num_patches": 16}, "text_config": TEXT},
            CheckpointError,
            "patches of",
        ),
    ],
)
def test_a_type_that_does_not_take_images_is_refused(
    kind: str, options: dict[str, Any], error: type[IsoPruneError], message: str, tmp_path: Path
) -> None:
    transformers.CONFIG_MAPPING[kind](**options).save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        load_base(str(tmp_path), False)


def test_a_transformers_folder_takes_a_new_head_and_keeps_the_rest(transformers_folder) -> None:
    folder = transformers_folder("hf-vit")
    whole, headed = load_base(str(folder)).model, load_base(str(folder), num_labels=9, seed=1).model
    before, after = weights(whole.model), weights(headed.model)
    assert after["classifier.weight"].shape == (9, 32) and headed.config.num_labels == 9
    head = {"classifier.weight", "classifier.bias"}
    assert_same(*({k: v for k, v in part.items() if k not in head} for part in (before, after)))


def test_a_base_saved_in_bfloat16_opens_in_bfloat16(tmp_path: Path) -> None:
    model = ViTForImageClassification(TRANSFORMERS["hf-vit"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert base.model.dtype == torch.bfloat16
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(output_of(base.model, images), output_of(model.eval(), images.to(torch.bfloat16)))


def test_a_path_below_the_home_folder_opens(transformers_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = transformers_folder("hf-vit")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert_same(weights(load_base("~/hf-vit").model), weights(load_base(str(folder)).model))


# --- folders of ours


def test_a_dense_folder_of_ours_opens_again(tmp_path: Path) -> None:
    base = tiny(num_labels=3, label_names=("cat", "dog", "owl"), seed=5)
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    again = load_base(str(tmp_path / "dense"))
    images = seeded_images(base)
    assert torch.equal(output_of(again.model, images), output_of(base.model, images))
    assert again.model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert again.model.config.source == base.model.config.source
    assert type(again.processor) is IsoImageProcessor and again.processor.to_dict() == base.processor.to_dict()


@pytest.mark.parametrize("family", ["vit", "resnet", "hf-vit"])
def test_a_pruned_folder_of_ours_opens_with_its_logits(family: str, pruned) -> None:
    sample = pruned(family)
    for labels in (None, 7):
        base = load_base(str(sample.folder), num_labels=labels)
        assert torch.equal(output_of(base.model, sample.images), sample.logits)
        assert base.model.config.stage == "pruned"
        assert base.model.config.structure == sample.model.config.structure
    assert type(base.processor) is type(sample.processor)


def test_a_dense_folder_of_ours_takes_a_new_head_and_keeps_the_rest(tmp_path: Path) -> None:
    base = tiny(num_labels=3, seed=5)
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    headed = load_base(str(tmp_path / "dense"), num_labels=6, label_names=tuple("abcdef"))
    assert headed.model.config.num_labels == 6 and headed.model.config.id2label[5] == "f"
    head = {"model.head.weight", "model.head.bias"}
    parts = (weights(base.model), weights(headed.model))
    assert_same(*({k: v for k, v in part.items() if k not in head} for part in parts))


def test_a_pruned_folder_of_ours_takes_no_new_head(pruned) -> None:
    with pytest.raises(RecipeError, match=r"^prune\.num_labels: "):
        load_base(str(pruned("vit").folder), num_labels=3)


def test_a_folder_of_ours_draws_seeded_weights_when_its_own_are_not_wanted(tmp_path: Path) -> None:
    base = tiny(num_labels=3, label_names=("cat", "dog", "owl"), seed=5)
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    drawn, again = (load_base(str(tmp_path / "dense"), False, seed=6).model for _ in range(2))
    assert_same(weights(drawn), weights(again))
    torch.manual_seed(6)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT)
    assert_same(weights(drawn.model), weights(expected))
    assert drawn.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert (drawn.config.source["pretrained"], drawn.config.source["seed"]) == (False, 6)


def test_a_pruned_folder_with_drawn_weights_keeps_its_pruned_architecture_or_is_refused(pruned) -> None:
    sample = pruned("vit")
    try:
        drawn = load_base(str(sample.folder), False, seed=6).model
    except RecipeError as error:
        assert "pruned" in str(error)
    else:
        shapes = {name: tensor.shape for name, tensor in sample.model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in drawn.state_dict().items()} == shapes


def put_in_cache(cache: Path, repo: str, folder: Path) -> None:
    """Lay a folder into the Hub's cache as a download would."""
    root, revision = cache / f"models--{repo.replace('/', '--')}", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    (root / "snapshots" / revision).mkdir(parents=True)
    for file in folder.iterdir():
        (root / "snapshots" / revision / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cut the network off and give an empty Hub cache."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "cache"


def test_a_hub_id_opens_from_the_cache_without_a_network(offline: Path, transformers_folder) -> None:
    put_in_cache(offline, "someone/vit", transformers_folder("hf-vit"))
    base = load_base("someone/vit")
    assert_same(weights(base.model), weights(load_base(str(transformers_folder("hf-vit"))).model))
    assert base.model.config.source["name"] == "someone/vit"


def test_a_hub_id_of_timm_opens_from_the_cache_without_a_network(offline: Path, tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    put_in_cache(offline, "someone/vit", folder)
    base = load_base("someone/vit")
    assert_same(dict(base.model.model.state_dict()), load_file(folder / "model.safetensors"))


def test_a_hub_id_of_ours_is_treated_as_its_folder_is(offline: Path, pruned) -> None:
    sample = pruned("vit")
    put_in_cache(offline, "someone/pruned", sample.folder)
    base = load_base("someone/pruned")
    assert torch.equal(output_of(base.model, sample.images), sample.logits)
    assert base.model.config.source == sample.model.config.source
    with pytest.raises(RecipeError, match=r"prune\.num_labels"):
        load_base("someone/pruned", num_labels=3)


# --- errors


def refused(name: str, *args: Any, **options: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load_base(name, *args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


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
@pytest.mark.parametrize("pretrained", [True, False])
def test_an_unknown_name_is_refused_with_the_nearest_known(name: str, near: str, pretrained: bool) -> None:
    message = refused(name, pretrained)
    assert name in message and re.search(rf"; did you mean .*\b{near}\b.*\?$", message)


def test_a_name_near_to_nothing_is_refused_without_a_suggestion() -> None:
    for name in ("zzzzqqqq", "timm/zzzzqqqq", "torchvision/zzzzqqqq"):
        message = refused(name)
        assert name in message and "did you mean" not in message


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_small", "r3d_18"])
def test_a_torchvision_model_of_another_task_is_refused(name: str) -> None:
    message = refused(f"torchvision/{name}", False)
    assert f"torchvision/{name}" in message and "not an image classifier" in message


def test_torchvision_weights_of_another_name_are_refused() -> None:
    message = refused("torchvision/resnet50.IMAGENET1K_V9")
    assert "'IMAGENET1K_V9'" in message and "IMAGENET1K_V1, IMAGENET1K_V2" in message


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_timm_tag_of_another_name_is_refused(pretrained: bool, offline: Path) -> None:
    assert "resnet50.nosuch_tag" in refused("timm/resnet50.nosuch_tag", pretrained)


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_transformers_folder_of_another_task_is_refused(pretrained: bool, tmp_path: Path) -> None:
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    message = refused(str(tmp_path), pretrained)
    assert str(tmp_path) in message and "bert" in message and "not an image classifier" in message


def test_a_transformers_backbone_without_a_head_is_refused(tmp_path: Path) -> None:
    transformers.ViTModel(TRANSFORMERS["hf-vit"]).save_pretrained(tmp_path)
    message = refused(str(tmp_path))
    assert str(tmp_path) in message and "classifier" in message


def test_a_timm_folder_without_a_head_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    timm.models.save_for_hf(model, tmp_path, model_args=VIT, model_config={"num_classes": 0}, safe_serialization=True)
    message = refused(str(tmp_path))
    assert str(tmp_path) in message and "not an image classifier" in message


@pytest.mark.parametrize("name", ["{}/nosuch", "./nosuch", "../nosuch", "~/nosuch_folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    assert repr(name) in refused(name)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"x"', "{}", '{"model_type": "nosuch"}', '{"a": 1}'])
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_folder_that_holds_no_model_is_refused(content: str | None, pretrained: bool, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert str(tmp_path) in refused(str(tmp_path), pretrained)


@pytest.mark.parametrize("name", [TINY, "torchvision/mobilenet_v2"])
def test_arguments_need_drawn_weights(name: str) -> None:
    assert "prune.model_args" in refused(name, True, model_args={"width_mult": 0.25})


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("kind", ["transformers", "timm", "ours"])
def test_a_folder_takes_no_arguments(kind: str, pretrained: bool, transformers_folder, pruned, tmp_path: Path) -> None:
    folders = {
        "transformers": lambda: transformers_folder("hf-vit"),
        "timm": lambda: save_timm(tmp_path),
        "ours": lambda: pruned("vit").folder,
    }
    assert "model_args" in refused(str(folders[kind]()), pretrained, model_args={"depth": 1})


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
def test_an_argument_that_the_architecture_does_not_take_is_refused(name: str, args: dict[str, Any]) -> None:
    message = refused(name, False, model_args=args)
    assert all(key in message for key in args)


@pytest.mark.parametrize(
    "name", [TINY, "vit_tiny_patch16_224", "torchvision/squeezenet1_1", "someone/model", "timm/resnet50.a1_in1k"]
)
def test_without_a_network_trained_weights_are_refused(name: str, offline: Path) -> None:
    message = refused(name)
    assert (
        "could not be fetched" in message and name.removeprefix("timm/") in message and "--prune.pretrained" in message
    )


@pytest.mark.parametrize("family", ["hf-vit", "timm", "ours"])
@pytest.mark.parametrize("damage", ["gone", "cut", "another shape", "a tensor short"])
def test_a_folder_with_damaged_weights_is_refused(
    family: str, damage: str, transformers_folder, pruned, tmp_path: Path
) -> None:
    source = {"hf-vit": lambda: transformers_folder("hf-vit"), "ours": lambda: pruned("vit").folder}
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


@pytest.mark.parametrize(
    "name", ["", " ", "\t", "\0", "a/\0", "timm/\x1b[31m", 5, None, True, ["timm/resnet18"], b"resnet18"]
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_what_is_no_name_is_refused_with_the_forms_of_names(name: Any, pretrained: bool) -> None:
    message = refused(name, pretrained)
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
        ("hf-hub:timm/resnet18", "nor a Hub id of the form owner/name"),
        ("a b/c", "nor a Hub id of the form owner/name"),
        ("\u00fc/\u00fc", "nor a Hub id of the form owner/name"),
        ("~nosuch_user/x", "does not exist"),
        ("x" * 5000, "has no model timm/xxx"),
        ("a/" + "x" * 5000, "could not be fetched"),
        ("torchvision/fasterrcnn_resnet50_fpn", "not an image classifier"),
        ("torchvision/deeplabv3_resnet50", "not an image classifier"),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_name_that_names_nothing_says_what_is_wrong_with_it(
    name: str, said: str, pretrained: bool, offline: Path
) -> None:
    assert said in refused(name, pretrained)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "samvit_base_patch16", "vit_base_patch16_siglip_224"])
def test_a_timm_model_without_a_head_is_refused(name: str) -> None:
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2} | ({"global_attn_indexes": []} if "sam" in name else {})
    message = refused(f"timm/{name}", False, model_args=args)
    assert f"timm/{name} is not an image classifier" in message


def test_spaces_around_a_name_are_no_part_of_it() -> None:
    assert tiny(name=f" {TINY}\n").model.config.source["name"] == TINY


@pytest.mark.parametrize("args", [[], [1], "x", "", 5, 0, True, False, {5: 1}, {None: 1}])
@pytest.mark.parametrize("name", [TINY, "torchvision/mobilenet_v2"])
def test_arguments_that_are_no_mapping_are_refused(name: str, args: Any) -> None:
    assert refused(name, False, model_args=args).startswith("prune.model_args must be a mapping ")


@pytest.mark.parametrize(
    "args",
    [
        {"checkpoint_path": "weights.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "x"}},
        {"pretrained_cfg_overlay": {"num_classes": 3}},
        {"features_only": True},
        {"cache_dir": "x"},
        {"depth": 10**9},
        {"drop_rate": float("nan")},
    ],
)
@pytest.mark.parametrize("name", [TINY, "torchvision/mobilenet_v2"])
def test_an_argument_that_would_read_files_or_never_end_is_refused_before_it_is_given(
    name: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: reached.append(1))
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: reached.append(1))
    message = refused(name, False, model_args=args)
    assert "is not allowed" in message and next(iter(args)) in message and reached == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(({"num_labels": value}, "prune.num_labels") for value in (0, -1, "x", 2.5, True, 10**9)),
        *(({"seed": value}, "prune.seed") for value in ("x", -1, 1.5, None, True, 2**70)),
        *(({"num_labels": 2, "label_names": value}, "label_names") for value in ("ab", ("a", 5), ("a", None))),
    ],
)
def test_an_option_of_another_kind_is_refused(options: dict[str, Any], said: str) -> None:
    message = refused(TINY, False, model_args=VIT, **options)
    assert message.startswith(f"{said} must be ") and repr(next(reversed(options.values()))) in message


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_masked_autoencoder_is_refused(pretrained: bool, tmp_path: Path) -> None:
    transformers.ViTMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    message = refused(str(tmp_path), pretrained)
    assert "is of type vit_mae, not an image classifier" in message


@pytest.mark.parametrize("family", ["hf-vit", "timm", "wrapped"])
def test_a_folder_without_weights_says_how_to_draw_them(family: str, tmp_path: Path) -> None:
    if family == "hf-vit":
        TRANSFORMERS[family].save_pretrained(tmp_path)
    elif family == "timm":
        tmp_path = save_timm(tmp_path)
    else:
        save_wrapped(tmp_path, *WRAPPED[0])
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    message = refused(str(tmp_path))
    assert str(tmp_path) in message and "model.safetensors" in message and "--prune.pretrained false" in message
    assert load_base(str(tmp_path), False).model.config.source["pretrained"] is False


def test_a_timm_folder_with_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "contains no model.safetensors" in refused(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": "x"},
        {"image_size": [3, 16, 16]},
        {"image_size": 0},
        {"image_size": 10**9},
        {"id2label": {"5": "a"}},
        {"id2label": [1]},
        {"hidden_size": "x"},
        {"num_hidden_layers": 10**9},
        {"model_type": ["vit"]},
        {"model_type": None},
        {"model_type": "nosuch", "auto_map": {"AutoConfig": "evil.Config"}},
        {"auto_map": 5},
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_damaged_transformers_folder_is_refused_in_one_line(
    changes: dict[str, Any], pretrained: bool, transformers_folder, tmp_path: Path
) -> None:
    folder = copy_of(transformers_folder("hf-vit"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused_by_a_child(str(folder), pretrained)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": None},
        {"architecture": 5},
        {"architecture": "nosuch"},
        {"architecture": "hf-hub:someone/model"},
        {"model_args": [1]},
        {"model_args": {"checkpoint_path": "x.pth"}},
        {"model_args": {"depth": 10**9}},
        {"num_classes": "x"},
        {"num_classes": 0},
        {"num_classes": 3},
        {"label_names": ["a"]},
        {"pretrained_cfg": []},
        {"pretrained_cfg": 5},
        {"pretrained_cfg": {"input_size": "x"}},
        {"pretrained_cfg": {"input_size": [3, 16, 16], "interpolation": "nosuch"}},
        {"pretrained_cfg": {"input_size": [3, 16, 16], "mean": "x"}},
        {"pretrained_cfg": {"input_size": [3, 16, 16], "std": [0, 0, 0]}},
        {"pretrained_cfg": {"input_size": [3, 16, 16], "crop_pct": -1}},
        {"pretrained_cfg": {"input_size": [3, 16, 16], "crop_pct": 1e-9}},
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_damaged_timm_folder_is_refused_in_one_line(
    changes: dict[str, Any], pretrained: bool, tmp_path: Path
) -> None:
    folder = save_timm(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused_by_a_child(str(folder), pretrained)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "5",
        "null",
        b"\xff\xfe{",
        "[" * 10**5,
        '{"size": "x"}',
        '{"crop_size": "x"}',
        '{"size": {"shortest_edge": -5}}',
        '{"size": {"shortest_edge": 0}}',
        '{"crop_size": {"height": 1000000000, "width": 1000000000}}',
        '{"image_mean": "x"}',
        '{"image_mean": [1, 2]}',
        '{"image_std": [0, 0, 0]}',
        '{"resample": "x"}',
        '{"resample": 99}',
        '{"image_processor_type": "Evil"}',
        '{"image_processor_type": 5}',
        '{"auto_map": 5}',
        "{}",  # the default makes images of 224 x 224
    ],
)
@pytest.mark.parametrize("family", ["vit", "hf-vit"])
def test_a_damaged_processor_is_refused_in_one_line(family: str, text: str | bytes | None, pruned, tmp_path) -> None:
    folder = copy_of(pruned(family).folder, tmp_path)
    file = folder / "preprocessor_config.json"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "processor" in refused_by_a_child(str(folder))


@pytest.mark.parametrize("text", ["", "{", '{"image_processor_type": "Evil"}', '{"size": "x"}'])
def test_a_damaged_processor_of_transformers_is_not_taken_for_none(text: str, transformers_folder, tmp_path) -> None:
    folder = copy_of(transformers_folder("hf-vit"), tmp_path)
    (folder / "preprocessor_config.json").write_text(text)
    assert refused_by_a_child(str(folder)).startswith("preprocessor_config.json of ")


def test_code_that_a_processor_names_is_neither_run_nor_asked_for(pruned, tmp_path, monkeypatch) -> None:
    folder = copy_of(pruned("vit").folder, tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoImageProcessor": "evil.Evil"}}))
    (folder / "evil.py").write_text("raise SystemExit('run')")
    try:
        assert type(load_base(str(folder)).processor) is IsoImageProcessor
    except IsoPruneError as error:
        assert "\n" not in str(error)


def test_a_folder_of_ours_with_the_type_of_another_is_refused(pruned, tmp_path: Path) -> None:
    folder = copy_of(pruned("vit").folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for kind in ("vit", "bert", "timm_wrapper", "nosuch"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        refused_by_a_child(str(folder))


def test_labels_keep_their_order_when_weights_are_drawn_anew(tmp_path: Path) -> None:
    names = tuple(f"class {chr(97 + index)}" for index in range(12))  # 10 and 11 come before 2 in the JSON
    base = tiny(num_labels=12, label_names=names)
    save_model_folder(tmp_path, base.model, base.processor)
    for pretrained in (True, False):
        assert load_base(str(tmp_path), pretrained).model.config.id2label == dict(enumerate(names))


def copy_of(source: Path, target: Path) -> Path:
    folder = target / "copied"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refused_by_a_child(name: str, *args: Any) -> str:
    with pytest.raises(IsoPruneError) as caught:
        load_base(name, *args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the pixels


def odd_images() -> Iterator[Image.Image]:
    """Give noise and waves: odd and even sides, both orientations, smaller than any crop, other modes."""
    rng = np.random.default_rng(0)
    sizes = [(37, 51), (51, 37), (223, 225), (225, 223), (224, 224), (481, 337), (375, 500), (333, 250)]
    sizes += [(7, 30), (300, 41), (260, 256), (247, 301), (1, 1)]
    modes = ["RGB"] * 7 + ["L", "RGBA", "P", "1", "LA", "CMYK"]  # all opaque
    for index, ((width, height), mode) in enumerate(zip(sizes, modes, strict=True)):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        rows, columns = np.mgrid[:height, :width]
        waves = np.stack([127 + 120 * np.sin(rows / k + columns / (k + 3)) for k in (5, 9, 17)], axis=-1)
        pixels = noise if index % 2 else waves.astype(np.uint8)
        yield Image.fromarray(pixels).convert(mode)
    for number in range(7):  # sides of every remainder, whose crop starts on a half row or a half column
        pixels = rng.integers(0, 256, (240 + number, 301 - 5 * number, 3), dtype=np.uint8)
        yield Image.fromarray(pixels)


def largest_difference(processor: Any, transform: Callable[[Image.Image], torch.Tensor]) -> float:
    """Compare normalised pixels; timm and torchvision read every file as RGB first."""
    return max(difference(processor, transform, image) for image in odd_images())


def difference(processor: Any, transform: Callable[[Image.Image], torch.Tensor], image: Image.Image) -> float:
    pixels = processor(image, return_tensors="pt").pixel_values[0]
    return (pixels - transform(image.convert("RGB"))).abs().max().item()


TINY_WIDTHS = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "args", "crop_pct", "interpolation"),
    [
        ("deit_small_distilled_patch16_224.fb_in1k", TINY_WIDTHS, 0.9, "bicubic"),
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", TINY_WIDTHS, 0.9, "bicubic"),
        ("swin_tiny_patch4_window7_224.ms_in1k", {"embed_dim": 24, "depths": [1], "num_heads": [2]}, 0.9, "bicubic"),
        ("convnext_tiny.fb_in1k", {"depths": [1] * 4, "dims": [8] * 4}, 0.875, "bicubic"),
        ("resnet50.a1_in1k", {"layers": [1] * 4, "channels": [8] * 4}, 0.95, "bicubic"),
        ("resnet50.tv_in1k", {"layers": [1] * 4, "channels": [8] * 4}, 0.875, "bilinear"),
        ("deit3_small_patch16_384.fb_in1k", TINY_WIDTHS, 1.0, "bicubic"),
    ],
)
def test_the_saved_processor_of_a_timm_base_gives_timms_pixels_exactly(
    name: str, args: dict[str, Any], crop_pct: float, interpolation: str, tmp_path: Path
) -> None:
    data = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    assert (data["crop_pct"], data["interpolation"]) == (crop_pct, interpolation)
    base = load_base(f"timm/{name}", False, model_args=args, num_labels=2)
    assert base.model.config.image_size == list(data["input_size"])
    save_model_folder(tmp_path, base.model, base.processor)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is IsoImageProcessor
    assert largest_difference(processor, timm.data.create_transform(**data, is_training=False)) == 0.0


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v2.IMAGENET1K_V1"])
def test_the_saved_processor_of_a_torchvision_base_gives_torchvisions_pixels_exactly(
    name: str, tmp_path: Path
) -> None:
    base = load_base(f"torchvision/{name}", False, model_args={"width_mult": 0.25})
    save_model_folder(tmp_path, base.model, base.processor)
    choices = torchvision.models.get_model_weights(name.partition(".")[0])
    transform = (choices[name.partition(".")[2]] if "." in name else choices.DEFAULT).transforms()
    assert largest_difference(AutoImageProcessor.from_pretrained(tmp_path), transform) == 0.0


def test_a_bicubic_preset_of_torchvision_is_given_exactly() -> None:
    transform = torchvision.models.Swin_T_Weights.DEFAULT.transforms()
    assert transform.interpolation.value == "bicubic"
    assert largest_difference(torchvision_processor(transform), transform) == 0.0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_as_timm_and_torchvision_drop_it(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
    base = tiny()
    data = timm.data.resolve_data_config(timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict())
    transform = timm.data.create_transform(**{**data, "input_size": (3, 16, 16), "crop_pct": 1.0}, is_training=False)
    assert difference(base.processor, transform, image) == 0.0


def test_a_batch_gives_the_pixels_of_its_images() -> None:
    processor = tiny().processor
    images = [image.convert("RGB") for image in odd_images()]
    batch = processor(images, return_tensors="pt").pixel_values
    single = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    assert torch.equal(batch, single)


def test_an_image_size_that_timm_never_trained_takes_the_whole_image() -> None:
    base = tiny()
    assert base.model.config.image_size == [3, 16, 16]
    data = timm.data.resolve_data_config(timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict())
    transform = timm.data.create_transform(**{**data, "input_size": (3, 16, 16), "crop_pct": 1.0}, is_training=False)
    assert largest_difference(base.processor, transform) == 0.0


def test_a_transform_that_cannot_be_given_exactly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"^evaluation transforms with crop mode 'border' .*$"):
        load_base(str(save_timm(tmp_path, crop_mode="border")))
