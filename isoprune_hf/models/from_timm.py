"""Open an image classifier of timm by name, or from a folder or Hub repository that timm or TimmWrapper wrote."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data.config import resolve_data_config, resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, build_limited, check_args
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.models.base import (
    OTHER_TASK,
    BaseModel,
    default_labels,
    draw_base,
    label_fields,
    single_line,
    unreadable,
    wrap_module,
)
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions, describe_source
from isoprune_hf.models.processors import timm_processor
from isoprune_hf.terminal import suggest

_MIN_CROP_SHARE = 1e-3  # far below every crop_pct of timm


def open_timm(source: BaseSource, options: LoadOptions) -> BaseModel:
    """Open an architecture with or without a tag of weights, or a saved model.

    Raises:
        RecipeError: The name is unknown or of another task, or the weights are damaged or could not be fetched.
    """
    if source.kind == "architecture":
        return _open_architecture(source, options)
    prefixed = _has_wrapper_prefix(Path(source.place) / "model.safetensors")
    if "transformers_version" in source.config or prefixed:
        return _open_wrapped(source, options)
    return _open_saved(source, options)


def is_encoder(name: str) -> bool:
    """Return whether a timm architecture has no head unless one is asked for."""
    known = get_pretrained_cfg(name)
    return known is not None and not known.num_classes


@dataclass(frozen=True)
class _Opened:
    """A module of timm and all that its config needs.

    Args:
        module: The module.
        architecture: Name of the architecture.
        model_args: Arguments of the architecture.
        data: Data config of timm: input size, crop, interpolation, mean and std.
        labels: Label names.
    """

    module: nn.Module
    architecture: str
    model_args: dict[str, Any]
    data: dict[str, Any]
    labels: Sequence[str]


def _open_architecture(source: BaseSource, options: LoadOptions) -> BaseModel:
    name = source.place
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = suggest(architecture, timm.list_models())
        raise RecipeError(f"model: timm {timm.__version__} has no model timm/{name}{near}")
    known = get_arch_pretrained_cfgs(architecture)
    if dot and name not in known:
        raise RecipeError(f"model: timm/{name}: unknown weights {tag!r}; timm has {', '.join(known) or 'none'}")
    if options.pretrained and options.model_args:
        raise RecipeError("prune.model_args changes the architecture and needs --prune.pretrained false")
    count = options.num_labels
    labels = options.head_labels(count) if count is not None and is_encoder(name) else None
    module = _create(
        name, f"timm/{name}", options.model_args, pretrained=options.pretrained, seed=options.seed, labels=labels
    )
    data = resolve_model_data_config(module)  # type: ignore[no-untyped-call]  # untyped in timm
    base = _wrap(_Opened(module, name, options.model_args, data, labels or _label_names(module)))
    if labels is not None:
        base.model.config.source = {**describe_source(source, options), "num_labels": count}
    return base


def _open_saved(source: BaseSource, options: LoadOptions) -> BaseModel:
    place = source.place
    architecture = source.config["architecture"]
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise RecipeError(f"model: {place}: timm {timm.__version__} has no architecture {architecture!r:.99}")
    model_args = source.config.get("model_args") or {}
    if not isinstance(model_args, dict):
        raise RecipeError(f"model: {place}/config.json: model_args must be a mapping, got {model_args!r:.99}")
    is_folder = source.kind == "folder"
    if is_folder and options.pretrained and not list(Path(place).glob("*.safetensors")):
        raise RecipeError(
            f"model: {place} contains no model.safetensors; for random weights, use --prune.pretrained false"
        )
    timm_name = f"{'local-dir' if is_folder else 'hf-hub'}:{place}"
    module = _create(timm_name, place, model_args, pretrained=options.pretrained, seed=options.seed)
    with _reading(place):
        data = resolve_model_data_config(module)  # type: ignore[no-untyped-call]  # untyped in timm
        labels = _label_names(module)
    return _wrap(_Opened(module, architecture, model_args, data, labels))


def _open_wrapped(source: BaseSource, options: LoadOptions) -> BaseModel:
    place = source.place
    with _reading(place):
        config = TimmWrapperConfig.from_pretrained(place)
        named = {int(index): name for index, name in (config.id2label or {}).items()}
        labels = [named[index] for index in range(config.num_labels or 0)]
    args = config.model_args or {}
    if not isinstance(args, dict):
        raise RecipeError(f"model: {place}/config.json: model_args must be a mapping, got {args!r:.99}")
    _checked_args(args)
    config.model_args = _with_tuples(args)
    if options.pretrained:
        module = _read_wrapped(place, config)
    else:
        base = {"library": "timm", "architecture": config.architecture, "args": args}
        module = draw_base(IsoPruneConfig(base=base, **label_fields(labels)), options.seed)
    noted = getattr(config, "pretrained_cfg", None) or module.pretrained_cfg
    with _reading(place):
        data = resolve_data_config(pretrained_cfg=noted)  # type: ignore[no-untyped-call]  # untyped in timm
    return _wrap(_Opened(module, config.architecture, args, data, labels))


def _read_wrapped(place: str, config: TimmWrapperConfig) -> nn.Module:
    with _reading(place):
        loaded: Any = TimmWrapperForImageClassification.from_pretrained(
            place, config=config, use_safetensors=True, output_loading_info=True
        )
    model, info = loaded
    if info["missing_keys"]:
        raise RecipeError(f"model: {place} has no trained weights for {sorted(info['missing_keys'])[0]}")
    module: nn.Module = model.timm_model
    return module


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Raise a RecipeError for the errors of timm and transformers on damaged files or unusable config values."""
    try:
        yield
    except IsoPruneError:
        raise
    except (OSError, SafetensorError) as error:
        raise unreadable(place, error) from error
    except LIBRARY_ERRORS as error:
        raise RecipeError(f"model: {place} is not a usable folder of timm: {single_line(error)}") from error


def _has_wrapper_prefix(file: Path) -> bool:
    """Return whether the tensors in a file have the names that TimmWrapper gives them."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return all(name.startswith("timm_model.") for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False  # the loader reports the damage


def _checked_args(model_args: dict[str, Any]) -> dict[str, Any]:
    try:
        return check_args(model_args)
    except CheckpointError as error:
        raise RecipeError(f"prune.model or prune.model_args: {error}") from error


def _create(
    source: str,
    name: str,
    model_args: dict[str, Any],
    *,
    pretrained: bool,
    seed: int,
    labels: Sequence[str] | None = None,
) -> nn.Module:
    """Build a module with timm.

    Args:
        source: Name for `timm.create_model`.
        name: Name for error messages.
        model_args: Arguments of the architecture.
        pretrained: Load trained weights.
        seed: Seed of random weights.
        labels: Label names of a head that an encoder is given, see `is_encoder`.
    """
    args = _with_tuples(_checked_args(_without_classes(model_args)))
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
            raise unreadable(name, error) from error
    missing = [attribute for attribute in ("num_classes", "pretrained_cfg") if not hasattr(module, attribute)]
    if missing:  # a builder that is not timm's own
        raise RecipeError(
            f"model: {name} has no {missing[0]}; a custom builder must set num_classes, and pretrained_cfg such as "
            "{'input_size': (3, 224, 224), 'num_classes': 1000}"
        )
    if not module.num_classes:
        raise RecipeError(f"model: {name} is {OTHER_TASK}, or add a head with --prune.num_labels")
    return module


def _wrap(opened: _Opened) -> BaseModel:
    classes = opened.module.num_classes
    if len(opened.labels) != classes:
        raise RecipeError(f"model: {opened.architecture} has {len(opened.labels)} label_names for {classes} classes")
    data = _at_size_of(opened.model_args, _checked_data(opened.architecture, opened.data))
    config = IsoPruneConfig(
        base={
            "library": "timm",
            "architecture": opened.architecture,
            "args": _without_classes(opened.model_args),
        },
        image_size=list(data["input_size"]),
        **label_fields(opened.labels),
    )
    return BaseModel(wrap_module(config, opened.module), timm_processor(data))


def _checked_data(architecture: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return the data config if its values can be computed with."""
    size = data["input_size"]
    allowed = {
        "input_size": isinstance(size, list | tuple) and len(size) == 3 and all(type(side) is int for side in size),
        "crop_pct": isinstance(data["crop_pct"], int | float) and data["crop_pct"] >= _MIN_CROP_SHARE,
        "crop_mode": isinstance(data["crop_mode"], str),
        "interpolation": isinstance(data["interpolation"], str),
        "mean": isinstance(data["mean"], list | tuple),
        "std": isinstance(data["std"], list | tuple),
    }
    for name, holds in allowed.items():
        if not holds:
            raise RecipeError(f"model: {architecture}: {name} in pretrained_cfg is not usable: {data[name]!r:.99}")
    return data


def _at_size_of(model_args: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the data config for the image size in the arguments of the architecture."""
    side = model_args.get("img_size") or data["input_size"][-1]
    size = tuple(side) if isinstance(side, list | tuple) else (side, side)
    if size == tuple(data["input_size"][1:]):
        return data
    # At a size that the weights were not trained at, the whole image is used, without a border.
    mode = "squash" if data["crop_mode"] == "border" else data["crop_mode"]
    return {**data, "input_size": (data["input_size"][0], *size), "crop_pct": 1.0, "crop_mode": mode}


def _without_classes(model_args: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model_args.items() if key != "num_classes"}


def _with_tuples(args: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}


def _label_names(module: Any) -> list[str]:
    names = module.pretrained_cfg.get("label_names")
    if names:
        return list(names)
    subset = infer_imagenet_subset(module)
    if subset is None or module.num_classes != 1000:
        return list(default_labels(module.num_classes))
    info = ImageNetInfo(subset)
    return [info.index_to_description(index, detailed=False) for index in range(module.num_classes)]
