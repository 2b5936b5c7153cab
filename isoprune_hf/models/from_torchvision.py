"""Open an image classifier of torchvision."""

from typing import Any

import torchvision

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.base import OTHER_TASK, BaseModel, draw, label_fields, not_opened, wrap
from isoprune_hf.models.processors import torchvision_processor
from isoprune_hf.terminal import suggest


def open_torchvision(name: str, pretrained: bool, model_args: dict[str, Any], seed: int) -> BaseModel:
    """Open `NAME` or `NAME.WEIGHTS`.

    Raises:
        RecipeError: The name is unknown, or its weights could not be fetched.
    """
    name, _, version = name.partition(".")
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        task = OTHER_TASK if name in torchvision.models.list_models() else "unknown"
        raise RecipeError(f"model: torchvision/{name} is {task}{suggest(name, known)}")
    if pretrained and model_args:
        raise RecipeError("prune.model_args changes the architecture: it needs --prune.pretrained false")
    choices = torchvision.models.get_model_weights(name)
    if version and version not in choices.__members__:
        raise RecipeError(
            f"model: torchvision/{name} has no weights {version!r}; it has {', '.join(choices.__members__)}"
        )
    weights = choices[version] if version else choices.DEFAULT
    transform = weights.transforms()
    crop = transform.crop_size[0]
    base = {"library": "torchvision", "architecture": name, "args": model_args}
    config = IsoPruneConfig(base=base, image_size=[3, crop, crop], **label_fields(weights.meta["categories"]))
    try:
        module = (
            torchvision.models.get_model(name, weights=weights, progress=False) if pretrained else draw(config, seed)
        )
    except OSError as error:
        raise not_opened(f"torchvision/{name}", error) from error
    return BaseModel(wrap(config, module), torchvision_processor(transform))
