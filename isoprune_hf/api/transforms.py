"""The image transform of a data set, for the calls that take one: `transformed`."""

from typing import Any

from transformers import BaseImageProcessor

from isoprune_hf.models.processors import with_transform
from isoprune_hf.recipes import DataRecipe


def transformed(processor: BaseImageProcessor, data: Any) -> BaseImageProcessor:
    """Return an image processor with the transform of a `DataRecipe`.

    Raises:
        RecipeError: They do not fit the processor.
    """
    if not isinstance(data, DataRecipe):
        return processor
    return with_transform(processor, **data.transform)
