"""Images with masks: the column is found by its name and its type, and is read as the class of each pixel."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from isoprune_hf.data.annotations import divide_annotations
from isoprune_hf.data.columns import MASK
from isoprune_hf.data.dataset import load_data
from isoprune_hf.data.masks import read_mask
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe


def save(place, *, image: str = "image", mask: str = "annotation", more: dict | None = None) -> DataRecipe:
    """Save four images with masks of class 0 to 3, and return the recipe that reads them."""
    images = [PILImage.new("RGB", (6, 4), (60 * index, 0, 0)) for index in range(4)]
    masks = [PILImage.fromarray(np.full((4, 6), index, np.uint8)) for index in range(4)]
    features = {image: Image(), mask: Image(), **{name: ClassLabel(names=["a", "b"]) for name in more or {}}}
    rows = Dataset.from_dict({image: images, mask: masks, **(more or {})}, features=Features(features))
    rows.save_to_disk(place / "data")
    return DataRecipe(dataset=str(place / "data"), holdout=0.5)


@pytest.mark.parametrize(
    "names", [("image", "annotation"), ("image", "mask"), ("pixel_values", "label"), ("image", "labels")], ids=str
)
def test_masks_are_found_by_name(names: tuple[str, str], tmp_path) -> None:
    images = load_data(save(tmp_path, image=names[0], mask=names[1]))
    assert images.label_names == ("unlabelled",)
    rows, masks = divide_annotations(images.evaluation, MASK)
    assert rows.column_names == ["image", "label"] and masks.column_names == [MASK] and len(rows) == 2
    colours = [np.asarray(row["image"])[0, 0, 0] // 60 for row in rows]
    found = [read_mask(row[MASK], reduces_labels=False) for row in masks]
    assert [int(mask.unique()) for mask in found] == colours and found[0].shape == (4, 6)


def test_masks_have_the_name_of_the_recipe(tmp_path) -> None:
    recipe = save(tmp_path, mask="ground_truth")
    assert divide_annotations(load_data(recipe).train, MASK)[1] is None
    named = DataRecipe(dataset=recipe.dataset, holdout=0.5, label_column="ground_truth")
    assert divide_annotations(load_data(named).train, MASK)[1] is not None


def test_classes_of_images_stay_beside_masks(tmp_path) -> None:
    images = load_data(save(tmp_path, more={"label": [0, 1, 0, 1]}))
    assert images.label_names == ("a", "b") and divide_annotations(images.train, MASK)[1] is not None


def test_reduced_masks_leave_out_class_zero(tmp_path) -> None:
    encoded = tmp_path / "mask.png"
    PILImage.fromarray(np.array([[0, 1], [2, 150]], np.uint8)).save(encoded)
    stored = {"path": str(encoded), "bytes": None}
    assert read_mask(stored, reduces_labels=True).tolist() == [[255, 0], [1, 149]]
    assert read_mask(stored, reduces_labels=False).dtype == torch.int64


def test_mask_of_several_channels_is_refused(tmp_path) -> None:
    PILImage.new("RGB", (3, 2)).save(tmp_path / "mask.png")
    with pytest.raises(DatasetError, match=r"shape \[2, 3, 3\]; masks have one channel"):
        read_mask({"path": str(tmp_path / "mask.png"), "bytes": None}, reduces_labels=False)
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="a mask cannot be read"):
        read_mask({"path": str(tmp_path / "no.png"), "bytes": None}, reduces_labels=False)
