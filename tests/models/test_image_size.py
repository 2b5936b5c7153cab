"""Another image size for a convolutional network: processor, cost and config agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_base
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.commands.steps.opening import with_data_transform
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import BaseModel
from isoprune_hf.models.processors import processed_size, with_transform
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.recipes import DataRecipe

CROPPED = IsoImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=2)
SQUASHED = IsoImageProcessor(size={"height": 240, "width": 240}, crop_size={"height": 224, "width": 224}, resample=2)


@pytest.mark.parametrize(
    "processor",
    [CROPPED, SQUASHED, ViTImageProcessor(), ConvNextImageProcessor(size={"shortest_edge": 384})],
    ids=["cropped", "squashed", "vit", "convnext"],
)
def test_processor_makes_images_of_the_size(processor: IsoImageProcessor) -> None:
    before = processor.to_dict()
    changed = with_transform(processor, image_size=32)
    assert processed_size("it", changed) == [3, 32, 32]
    assert processor.to_dict() == before
    assert with_transform(changed, image_size=32) is changed
    again = type(processor)(**{name: value for name, value in changed.to_dict().items() if "type" not in name})
    image = Image.fromarray(np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3))
    made = [each(image, return_tensors="pt").pixel_values for each in (changed, again)]
    assert torch.equal(*made)


def test_resize_keeps_its_proportion_unless_set() -> None:
    assert dict(with_transform(CROPPED, image_size=32).size)["shortest_edge"] == 36  # 256 * 32 / 224, rounded down
    assert dict(with_transform(CROPPED, image_size=32, resize=32).size)["shortest_edge"] == 32


def test_cost_is_counted_at_the_size(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    _, side, _ = model.config.image_size
    whole = count_cost(model).macs
    processor = IsoImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    base = with_data_transform(BaseModel(model, processor), DataRecipe(image_size=side // 2))
    assert base.model.config.image_size == [3, side // 2, side // 2] == processed_size("it", base.processor)
    head = model.model.fc.in_features * model.model.fc.out_features
    assert count_cost(base.model).macs - head == pytest.approx((whole - head) / 4, rel=0.02)


def test_network_of_one_size_is_refused(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    processor = IsoImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    with pytest.raises(RecipeError, match=r"data\.image_size 32"):
        with_data_transform(BaseModel(model, processor), DataRecipe(image_size=32))
    assert model.config.image_size == [3, 16, 16]
