"""Open an image classifier of timm: by its name, or from a folder or Hub repository of timm or of TimmWrapper."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import ImageNetInfo, resolve_data_config, resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, build_limited, check_args
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.models.base import OTHER_TASK, BaseModel, draw, label_fields, not_opened, one_line, wrap
from isoprune_hf.models.processors import timm_processor
from isoprune_hf.terminal import suggest


def open_timm(
    name: str, pretrained: bool, model_args: dict[str, Any], seed: int, labels: tuple[str, ...] | None = None
) -> BaseModel:
    """Open an architecture, with or without a tag of weights.

    Args:
        name: The architecture, and perhaps a tag.
        pretrained: Load trained weights.
        model_args: Arguments of the architecture.
        seed: Seed of drawn weights.
        labels: Names of the labels of a head that an encoder is given: see `is_encoder`.

    Raises:
        RecipeError: The name is unknown or of another task, or the weights could not be fetched.
    """
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = suggest(architecture, timm.list_models())
        raise RecipeError(f"model: timm {timm.__version__} has no model timm/{name}{near}")
    known = get_arch_pretrained_cfgs(architecture)
    if dot and name not in known:
        raise RecipeError(f"model: timm/{name}: no such weights {tag!r}; timm has {', '.join(known) or 'none of it'}")
    if pretrained and model_args:
        raise RecipeError("prune.model_args changes the architecture: it needs --prune.pretrained false")
    module = _create(name, f"timm/{name}", pretrained, model_args, seed, labels)
    return _describe(module, resolve_model_data_config(module), name, model_args, list(labels or _names(module)))


def is_encoder(name: str) -> bool:
    """Whether an architecture has no head unless one is asked for."""
    known = get_pretrained_cfg(name)
    return known is not None and not known.num_classes


def open_saved_timm(place: str, config: dict[str, Any], pretrained: bool, seed: int) -> BaseModel:
    """Open a folder or a Hub id with its `config.json`.

    Raises:
        RecipeError: It is of another task, damaged, or could not be fetched.
    """
    wrapped = "transformers_version" in config or _holds_prefix(Path(place) / "model.safetensors")
    try:
        return _open_wrapped(place, pretrained, seed) if wrapped else _open_plain(place, config, pretrained, seed)
    except IsoPruneError:
        raise
    except (OSError, SafetensorError) as error:
        raise not_opened(place, error) from error
    except LIBRARY_ERRORS as error:
        raise RecipeError(f"model: {place} is no usable folder of timm: {one_line(error)}") from error


def _open_plain(place: str, config: dict[str, Any], pretrained: bool, seed: int) -> BaseModel:
    local, architecture, model_args = Path(place).is_dir(), config["architecture"], config.get("model_args") or {}
    if not timm.is_model(architecture):
        raise RecipeError(f"model: {place} is of an architecture that timm has not: {architecture!r:.99}")
    if local and pretrained and not list(Path(place).glob("*.safetensors")):
        raise RecipeError(f"model: {place} holds no model.safetensors; draw weights with --prune.pretrained false")
    module = _create(f"{'local-dir' if local else 'hf-hub'}:{place}", place, pretrained, model_args, seed)
    return _describe(module, resolve_model_data_config(module), architecture, model_args, _names(module))


def _open_wrapped(place: str, pretrained: bool, seed: int) -> BaseModel:
    config = TimmWrapperConfig.from_pretrained(place)
    args = _checked(config.model_args or {})
    config.model_args = _tuples(args)
    data = getattr(config, "pretrained_cfg", None)
    names = [config.id2label[index] for index in range(config.num_labels)]
    if pretrained:
        model, info = TimmWrapperForImageClassification.from_pretrained(
            place, config=config, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise RecipeError(f"model: {place} has no trained {sorted(info['missing_keys'])[0]}")
        module = model.timm_model
    else:
        base = {"library": "timm", "architecture": config.architecture, "args": args}
        module = draw(IsoPruneConfig(base=base, **label_fields(names)), seed)
    data = resolve_data_config(pretrained_cfg=data or module.pretrained_cfg)
    return _describe(module, data, config.architecture, args, names)


def _holds_prefix(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return all(name.startswith("timm_model.") for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False  # said by what opens it


def _checked(model_args: dict[str, Any]) -> dict[str, Any]:
    try:
        return check_args(model_args)
    except CheckpointError as error:
        raise RecipeError(f"prune.model or model_args: {error}") from error


def _create(
    source: str,
    name: str,
    pretrained: bool,
    model_args: dict[str, Any],
    seed: int,
    labels: tuple[str, ...] | None = None,
) -> nn.Module:
    args = _tuples(_checked({key: value for key, value in model_args.items() if key != "num_classes"}))
    if labels is not None:
        args["num_classes"] = len(labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            module = build_limited(
                f"timm cannot build {name!r} with {model_args}",
                lambda: timm.create_model(source, pretrained=pretrained, **args),
            )
        except CheckpointError as error:
            raise RecipeError(f"model: {error}") from error
        except (OSError, SafetensorError) as error:
            raise not_opened(name, error) from error
    missing = [attribute for attribute in ("num_classes", "pretrained_cfg") if not hasattr(module, attribute)]
    if missing:  # every model of timm has them
        raise RecipeError(
            f"model: {name} has no {missing[0]}; a builder of your own sets num_classes, and pretrained_cfg as "
            "{'input_size': (3, 224, 224), 'num_classes': 1000}"
        )
    if not module.num_classes:
        raise RecipeError(f"model: {name} is {OTHER_TASK}, or ask for one with --prune.num_labels")
    return module


def _describe(
    module: nn.Module, data: dict[str, Any], architecture: str, model_args: dict[str, Any], names: list[str]
) -> BaseModel:
    if len(names) != module.num_classes:
        raise RecipeError(f"model: {architecture} has {len(names)} label_names for {module.num_classes} classes")
    side = model_args.get("img_size") or data["input_size"][-1]
    size = (side, side) if isinstance(side, int) else tuple(side)
    if size != tuple(data["input_size"][1:]):
        # Of an image size that the trained weights never saw, the whole image is used, and no border is drawn.
        mode = "squash" if data["crop_mode"] == "border" else data["crop_mode"]
        data = {**data, "input_size": (data["input_size"][0], *size), "crop_pct": 1.0, "crop_mode": mode}
    args = {key: value for key, value in model_args.items() if key != "num_classes"}
    config = IsoPruneConfig(
        base={"library": "timm", "architecture": architecture, "args": args},
        image_size=list(data["input_size"]),
        **label_fields(names),
    )
    return BaseModel(wrap(config, module), timm_processor(data))


def _tuples(args: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}


def _names(module: nn.Module) -> list[str]:
    names = module.pretrained_cfg.get("label_names")
    if names:
        return list(names)
    subset = timm.data.infer_imagenet_subset(module)
    if subset is None or module.num_classes != 1000:
        return [f"LABEL_{index}" for index in range(module.num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index, detailed=False) for index in range(module.num_classes)]
