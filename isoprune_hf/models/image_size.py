"""The size of the images that a model reads: `set_image_size`."""

from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.difference import run_once
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models.processors import processed_size


def set_image_size(model: IsoPruneForImageClassification, processor: BaseImageProcessor) -> None:
    """Set the image size in the config of a model, in place, to that of a processor: costs are counted at it.

    Raises:
        RecipeError: The model does not take images of the size.
    """
    size = processed_size("the model", processor)
    if size == model.config.image_size:
        return
    try:
        run_once(meta_copy(model).model, [(None, size)])
    except CheckpointError as error:
        raise RecipeError(
            f"data.image_size {size[-1]}: the model does not take images of this size ({error}); an untrained "
            f"transformer of timm is built for it with prune.model_args: {{img_size: {size[-1]}}}"
        ) from error
    model.config.image_size = size
