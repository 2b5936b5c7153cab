"""Open an image classifier of torchvision."""

import inspect
from typing import Any

import torch
import torchvision
from torch import nn

from isoprune_hf.checkpoint.dense import build_base
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.plain_values import is_plain
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.base import OTHER_TASK, UNTRAINED, BaseModel, draw_base, label_fields, unreadable, wrap_module
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions
from isoprune_hf.models.processors import torchvision_processor
from isoprune_hf.terminal import suggest


def open_torchvision(source: BaseSource, options: LoadOptions) -> BaseModel:
    """Open `NAME` or `NAME.WEIGHTS`.

    Raises:
        RecipeError: The name is unknown, or its weights could not be fetched.
    """
    name, _, version = source.place.partition(".")
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        task = OTHER_TASK if name in torchvision.models.list_models() else "unknown"
        raise RecipeError(f"model: torchvision/{name} is {task}{suggest(name, known)}")
    if options.pretrained and options.model_args:
        raise RecipeError(f"prune.model_args changes the architecture and needs {UNTRAINED}")
    choices = torchvision.models.get_model_weights(name)
    if version and version not in choices.__members__:
        raise RecipeError(
            f"model: torchvision/{name} has no weights {version!r}; available: {', '.join(choices.__members__)}"
        )
    weights = choices[version] if version else choices.DEFAULT
    transform = weights.transforms()
    crop = transform.crop_size[0]
    base = {"library": "torchvision", "architecture": name, "args": options.model_args}
    config = IsoPruneConfig(base=base, image_size=[3, crop, crop], **label_fields(weights.meta["categories"]))
    try:
        if options.pretrained:
            module = torchvision.models.get_model(name, weights=weights, progress=False)
        else:
            module = draw_base(config, options.seed)
    except OSError as error:
        raise unreadable(f"torchvision/{name}", error) from error
    config.base = {**base, "args": {**options.model_args, **args_of_module(config, module)}}
    return BaseModel(wrap_module(config, module), torchvision_processor(transform))


def args_of_module(config: IsoPruneConfig, module: nn.Module) -> dict[str, Any]:
    """Return the arguments that trained weights or a caller change: those that a module keeps under their names.

    Args:
        config: Config without these arguments.
        module: The model, such as a GoogLeNet without auxiliary heads.
    """
    with torch.device("meta"):
        built = vars(build_base(config))
    kept = vars(module)
    names = inspect.signature(type(module)).parameters.keys() & kept.keys() - {"num_classes"}
    return {name: kept[name] for name in sorted(names) if is_plain(kept[name]) and kept[name] != built.get(name)}
