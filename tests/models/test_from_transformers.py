"""Models of transformers from folders and the Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.bases import (
    CLASSES,
    assert_same,
    copy_of,
    odd_images,
    output_of,
    put_in_cache,
    refused,
    weights,
)
from helpers.depth_networks import make_glpn
from helpers.tiny_models import TRANSFORMERS
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BertConfig,
    GLPNImageProcessor,
    ViTForImageClassification,
    ViTImageProcessor,
)

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.models import load_base

TOWER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


TEXT = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


# Types whose configs differ from the others: name -> (type, values, side of the image).
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


@pytest.mark.parametrize("family", CLASSES)
def test_folder_opens_with_logits_and_pixels(family: str, transformers_folder, tmp_path: Path) -> None:
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
def test_config_alone_draws_the_weights_of_transformers(family: str, tmp_path: Path) -> None:
    TRANSFORMERS[family].save_pretrained(tmp_path)
    base = load_base(str(tmp_path), pretrained=False, seed=9)
    torch.manual_seed(9)
    expected = CLASSES[family](type(TRANSFORMERS[family]).from_pretrained(tmp_path))
    assert_same(weights(base.model.model), weights(expected))


# The saved processor is compared with that of transformers above.
@pytest.mark.parametrize(("family", "saved"), [*((family, False) for family in CLASSES), ("hf-swin", True)])
def test_processor_produces_images_of_the_model_size(
    family: str, saved: bool, transformers_folder, tmp_path: Path
) -> None:
    TRANSFORMERS[family].save_pretrained(tmp_path)
    base = load_base(str(transformers_folder(family) if saved else tmp_path), False)
    for image in (Image.new("RGB", (50, 37)), Image.new("RGB", (300, 400))):
        pixels = base.processor(image, return_tensors="pt").pixel_values
        assert list(pixels.shape[1:]) == base.model.config.image_size
    assert output_of(base.model, pixels).isfinite().all()


def test_processor_without_size_is_refused_with_advice(tmp_path: Path) -> None:
    """As GLPN is published: its processor rounds the sides of an image, whatever they are."""
    make_glpn().save_pretrained(tmp_path)
    GLPNImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no image size in "):
        load_base(str(tmp_path), tasks=TASK_FORMS)
    ViTImageProcessor(size={"height": 64, "width": 96}, do_normalize=False).save_pretrained(tmp_path)
    assert load_base(str(tmp_path), tasks=TASK_FORMS).model.config.image_size == [3, 64, 96]


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_unusual_config_opens_with_fitting_processor(name: str, tmp_path: Path) -> None:
    kind, options, side = OTHER_CONFIGS[name]
    config = transformers.CONFIG_MAPPING[kind](**options)
    config.save_pretrained(tmp_path / "config")
    base = load_base(str(tmp_path / "config"), pretrained=False)
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
def test_type_that_takes_no_images_is_refused(
    kind: str, options: dict[str, Any], error: type[IsoPruneError], message: str, tmp_path: Path
) -> None:
    transformers.CONFIG_MAPPING[kind](**options).save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        load_base(str(tmp_path), pretrained=False)


def test_transformers_folder_takes_a_new_head(transformers_folder) -> None:
    folder = transformers_folder("hf-vit")
    whole, headed = load_base(str(folder)).model, load_base(str(folder), num_labels=9, seed=1).model
    before, after = weights(whole.model), weights(headed.model)
    assert after["classifier.weight"].shape == (9, 32) and headed.config.num_labels == 9
    head = {"classifier.weight", "classifier.bias"}
    assert_same(*({k: v for k, v in part.items() if k not in head} for part in (before, after)))


def test_base_saved_in_bfloat16_opens_in_bfloat16(tmp_path: Path) -> None:
    model = ViTForImageClassification(TRANSFORMERS["hf-vit"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert base.model.dtype == torch.bfloat16
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(output_of(base.model, images), output_of(model.eval(), images.to(torch.bfloat16)))


def test_hub_id_opens_from_cache_offline(offline: Path, transformers_folder) -> None:
    put_in_cache(offline, "someone/vit", transformers_folder("hf-vit"))
    base = load_base("someone/vit")
    assert_same(weights(base.model), weights(load_base(str(transformers_folder("hf-vit"))).model))
    assert base.model.config.source["name"] == "someone/vit"


def test_transformers_folder_of_another_task_is_refused(tmp_path: Path) -> None:
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    message = refused(str(tmp_path), pretrained=False)
    assert str(tmp_path) in message and "bert" in message and "not an image classifier" in message


def test_backbone_without_head_is_refused(tmp_path: Path) -> None:
    transformers.ViTModel(TRANSFORMERS["hf-vit"]).save_pretrained(tmp_path)
    message = refused(str(tmp_path))
    assert str(tmp_path) in message and "prune.num_labels" in message


def test_masked_autoencoder_is_refused(tmp_path: Path) -> None:
    transformers.ViTMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    message = refused(str(tmp_path))
    assert "is of type vit_mae, not an image classifier" in message


@pytest.mark.parametrize(
    ("changes", "pretrained"),
    [
        ({"image_size": "x"}, True),
        ({"image_size": [3, 16, 16]}, False),
        ({"image_size": 0}, True),
        ({"image_size": 10**9}, False),
        ({"id2label": {"5": "a"}}, True),
        ({"id2label": [1]}, False),
        ({"hidden_size": "x"}, True),
        ({"hidden_size": "x"}, False),
        ({"num_hidden_layers": 10**9}, True),
        ({"num_hidden_layers": 10**9}, False),
        ({"model_type": ["vit"]}, True),
        ({"model_type": None}, False),
        ({"model_type": "nosuch", "auto_map": {"AutoConfig": "evil.Config"}}, True),
        ({"auto_map": 5}, False),
    ],
)
def test_damaged_transformers_config_is_refused(
    changes: dict[str, Any], pretrained: bool, transformers_folder, tmp_path: Path
) -> None:
    folder = copy_of(transformers_folder("hf-vit"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(str(folder), IsoPruneError, pretrained=pretrained)


def test_tensors_of_a_base_are_aligned(transformers_folder) -> None:
    model = load_base(str(transformers_folder("hf-vit"))).model
    assert not any(tensor.data_ptr() % 64 for tensor in model.state_dict().values())
