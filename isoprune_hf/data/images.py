"""The images of a data set as batches of inputs and labels: `holds_images` and `image_batches`."""

from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import BaseImageProcessor

from isoprune_hf.data.dataset import ImageData, labelled_rows, load_data
from isoprune_hf.data.labels import align_labels
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe


def holds_images(data: Any) -> bool:
    """Return whether data are the name, folder or recipe of a data set, opened or not, or rows with encoded images."""
    if isinstance(data, str | Path | DataRecipe | ImageData):
        return True
    return (
        isinstance(data, Dataset) and len(data) > 0 and not any(isinstance(cell, Tensor) for cell in data[0].values())
    )


def holds_rows(data: Any) -> bool:
    """Return whether data are rows of `datasets`, which a loader makes batches of."""
    return isinstance(data, Dataset | IterableDataset)


def image_batches(
    data: str | Path | DataRecipe | ImageData | Dataset,
    processor: BaseImageProcessor,
    *,
    batches: int,
    batch_size: int,
    seed: int,
    id2label: dict[int, str] | None = None,
) -> CalibrationBatches:
    """Draw images of a data set and make them the inputs of a model.

    Args:
        data: See `holds_images`; of a name, folder or recipe the training split is read.
        processor: Makes the inputs.
        batches: Number of batches.
        batch_size: Images of each.
        seed: Of the draw.
        id2label: Classes of the model if they are known; the labels are numbered by them, see `align_labels`.

    Raises:
        DatasetError: The data set cannot be opened, has no images with labels, or has other classes.
    """
    opened = open_images(data)
    if id2label:
        opened = align_labels(opened, id2label)
    if not isinstance(opened.train, Dataset):
        raise DatasetError(f"data: {opened.name} has no training split to score on; set data.train_split")
    options = LoaderOptions(batch_size, decoding=opened.decoding)
    return CalibrationBatches(opened.train, processor, options, batches=batches, seed=seed)


def open_images(data: str | Path | DataRecipe | ImageData | Dataset) -> ImageData:
    """Open images with labels, see `holds_images`; rows become the training split.

    Raises:
        DatasetError: The data set cannot be opened, or has no images with labels.
    """
    if isinstance(data, ImageData):
        return data
    if isinstance(data, Dataset):
        return labelled_rows(data)
    return load_data(data if isinstance(data, DataRecipe) else DataRecipe(dataset=str(data)))
