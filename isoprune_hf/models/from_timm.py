"""Open an image classifier of timm: by its name, or from a folder or a Hub repository that timm wrote."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.models import load_model_config_from_hf
from timm.models._hub import load_model_config_from_path
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.base import OTHER_TASK, BaseModel, label_fields, not_fetched, one_line, suggest, wrap
from isoprune_hf.processors import timm_processor

# What timm raises for names, arguments and files that do not fit.
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    LookupError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


def open_timm(name: str, pretrained: bool, model_args: dict[str, Any], seed: int) -> BaseModel:
    """Open an architecture, with or without a tag of weights, or `hf-hub:ID` or `local-dir:FOLDER`.

    Raises:
        RecipeError: The name is unknown or of another task, or the weights do not fit or could not be fetched.
    """
    if not name.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(name):
        near = suggest(name, timm.list_models())
        raise RecipeError(f"model: timm {timm.__version__} has no model timm/{name}{near}")
    if pretrained and model_args:
        raise RecipeError("prune.model_args changes the architecture: it needs --prune.pretrained false")
    try:
        architecture = name
        if name.startswith("hf-hub:"):
            _, architecture, model_args = load_model_config_from_hf(name.removeprefix("hf-hub:"))
        elif name.startswith("local-dir:"):
            _, architecture, model_args = load_model_config_from_path(Path(name.removeprefix("local-dir:")))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = timm.create_model(name, pretrained=pretrained, **_tuples(model_args or {}))
    except OSError as error:
        raise not_fetched(name, error) from error
    except _BUILD_ERRORS as error:
        raise RecipeError(f"model: timm cannot build {name!r} with {model_args}: {one_line(error)}") from error
    if not module.num_classes:
        raise RecipeError(f"model: {name} is {OTHER_TASK}")
    return _describe(module, architecture, model_args or {})


def _describe(module: nn.Module, architecture: str, model_args: dict[str, Any]) -> BaseModel:
    data = resolve_model_data_config(module)
    side = model_args.get("img_size", data["input_size"][-1])
    size = (side, side) if isinstance(side, int) else tuple(side)
    if size != tuple(data["input_size"][1:]):
        # Of an image size that the trained weights never saw, the whole image is used.
        data |= {"input_size": (data["input_size"][0], *size), "crop_pct": 1.0}
    names = module.pretrained_cfg.get("label_names") or _imagenet_names(module)
    config = IsoPruneConfig(
        base={
            "library": "timm",
            "architecture": architecture,
            "args": {key: value for key, value in model_args.items() if key != "num_classes"},
        },
        image_size=list(data["input_size"]),
        **label_fields(names or [f"LABEL_{index}" for index in range(module.num_classes)]),
    )
    return BaseModel(wrap(config, module), timm_processor(data))


def _tuples(args: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}


def _imagenet_names(module: nn.Module) -> list[str] | None:
    subset = timm.data.infer_imagenet_subset(module)
    if subset is None or module.num_classes != 1000:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(index, detailed=False) for index in range(module.num_classes)]
