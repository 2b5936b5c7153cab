"""Open an image classifier of timm by name, or from a folder or Hub repository that timm or TimmWrapper wrote."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data.config import resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import nn
from transformers.utils.hub import cached_file, extract_commit_hash

from isoprune_hf.checkpoint.dense import build_limited
from isoprune_hf.checkpoint.task_forms import IMAGE_FEATURE_EXTRACTION
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models.base import OTHER_TASK, UNTRAINED, BaseModel, unreadable, without_head
from isoprune_hf.models.head import with_new_head
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions, describe_source
from isoprune_hf.models.stored_type import default_type, stored_type
from isoprune_hf.models.timm_base import (
    TimmModule,
    checked_args,
    reading,
    timm_labels,
    without_classes,
    wrap_timm,
)
from isoprune_hf.models.timm_wrapper import has_wrapper_prefix, open_wrapped
from isoprune_hf.terminal import suggest

# Files in which timm looks for weights on the Hub, in its order.
_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def open_timm(source: BaseSource, options: LoadOptions) -> BaseModel:
    """Open an architecture with or without a tag of weights, or a saved model.

    Raises:
        RecipeError: The name is unknown or of another task, or the weights are damaged or could not be fetched.
    """
    if source.kind == "architecture":
        return _open_architecture(source, options)
    prefixed = has_wrapper_prefix(Path(source.place) / "model.safetensors")
    if "transformers_version" in source.config or prefixed:
        return open_wrapped(source, options)
    return _open_saved(source, options)


def is_encoder(name: str) -> bool:
    """Return whether a timm architecture has no head unless one is asked for."""
    known = get_pretrained_cfg(name)
    return known is not None and not known.num_classes


def _open_architecture(source: BaseSource, options: LoadOptions) -> BaseModel:
    name = source.place
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = suggest(architecture, timm.list_models())
        raise RecipeError(f"model: timm {timm.__version__} has no model timm/{name}{near}")
    known = get_arch_pretrained_cfgs(architecture)
    if dot and name not in known:
        raise RecipeError(f"model: timm/{name}: unknown weights {tag!r}; timm has {', '.join(known) or 'none'}")
    if options.pretrained and options.model_args.keys() - {"in_chans"}:  # to which timm adapts trained weights
        raise RecipeError(f"prune.model_args changes the architecture and needs {UNTRAINED}")
    labels = _head_labels(options) if is_encoder(name) else None
    module = _create(name, f"timm/{name}", options.model_args, options, labels, revision=source.revision)
    data = resolve_model_data_config(module)  # type: ignore[no-untyped-call]  # untyped in timm
    base = wrap_timm(TimmModule(module, name, options.model_args, data, labels or timm_labels(module)))
    if options.pretrained:
        source = replace(source, revision=_commit_of(module, source.revision))
    if labels is not None:
        return with_new_head(base, source, options)
    base.model.config.source = describe_source(source, options)
    return base


def _commit_of(module: Any, revision: str | None) -> str | None:
    """Return the commit of the Hub that the weights of a module were read from; None if they came from elsewhere."""
    place = module.pretrained_cfg.get("hf_hub_id")
    for file in _WEIGHTS if place else ():
        with suppress(OSError):  # the cache has another of the files
            path = cached_file(place.partition("@")[0], file, revision=revision, local_files_only=True)
            return extract_commit_hash(path, None)
    return None


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
        raise RecipeError(f"model: {place} contains no model.safetensors; for random weights, use {UNTRAINED}")
    timm_name = f"local-dir:{place}" if is_folder else f"hf-hub:{place}@{source.revision or 'main'}"
    labels = _head_labels(options) if _is_saved_encoder(source.config) else None
    with torch.device("meta"):  # refuses an oversized model before memory is allocated
        _build(architecture, place, checked_args(without_classes(model_args)), pretrained=False)
    with default_type(stored_type(place, source.revision) if options.pretrained else torch.float32):
        module = _create(timm_name, place, model_args, options, labels)
    with reading(place):
        data = resolve_model_data_config(module)  # type: ignore[no-untyped-call]  # untyped in timm
        names = labels or timm_labels(module)
    base = wrap_timm(TimmModule(module, architecture, model_args, data, names))
    return base if labels is None else with_new_head(base, source, options)


def _is_saved_encoder(config: dict[str, Any]) -> bool:
    known = config.get("pretrained_cfg")
    return config.get("num_classes", known.get("num_classes") if isinstance(known, dict) else None) == 0


def _head_labels(options: LoadOptions) -> tuple[str, ...] | None:
    return None if options.num_labels is None else options.head_labels(options.num_labels)


def _create(
    source: str,
    name: str,
    model_args: dict[str, Any],
    options: LoadOptions,
    labels: Sequence[str] | None = None,
    *,
    revision: str | None = None,
) -> nn.Module:
    """Build a module with timm.

    Args:
        source: Name for `timm.create_model`.
        name: Name for error messages.
        model_args: Arguments of the architecture.
        options: Whether to load trained weights, and the seed of random ones.
        labels: Label names of a head that an encoder is given, see `is_encoder`.
        revision: Commit, branch or tag of the Hub that the trained weights of an architecture are read from.
    """
    args = checked_args(without_classes(model_args))
    pinned = {} if revision is None or not options.pretrained else _pinned(source, revision)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        if labels is None:
            module = _build(source, name, {**args, **pinned}, pretrained=options.pretrained)
        else:
            module = _build(source, name, {**args, "num_classes": len(labels)}, pretrained=False)
            if options.pretrained:  # with a head timm would not say which tensors of the encoder the file lacks
                encoder = _build(source, name, {**args, **pinned, "num_classes": 0}, pretrained=True)
                module.load_state_dict(encoder.state_dict(), strict=False)
    missing = [attribute for attribute in ("num_classes", "pretrained_cfg") if not hasattr(module, attribute)]
    if missing:  # a builder that is not timm's own
        raise RecipeError(
            f"model: {name} has no {missing[0]}; a custom builder must set num_classes, and pretrained_cfg such as "
            "{'input_size': (3, 224, 224), 'num_classes': 1000}"
        )
    if not module.num_classes and not options.takes_as_is(IMAGE_FEATURE_EXTRACTION):
        raise without_head(name) if labels is None else RecipeError(f"model: {name} is {OTHER_TASK}")
    return module


def _pinned(name: str, revision: str) -> dict[str, Any]:
    """Return the argument of timm that reads the weights of an architecture from a revision of their repository."""
    known = get_pretrained_cfg(name)
    place = None if known is None else known.hf_hub_id
    return {"pretrained_cfg_overlay": {"hf_hub_id": f"{place}@{revision}"}} if place else {}


def _build(source: str, name: str, args: dict[str, Any], *, pretrained: bool) -> nn.Module:
    try:
        return build_limited(
            f"timm cannot build {name!r} with {args}", lambda: timm.create_model(source, pretrained=pretrained, **args)
        )
    except CheckpointError as error:
        raise RecipeError(f"model: {error}") from error
    except (OSError, SafetensorError) as error:
        raise unreadable(name, error) from error
