"""Open an image classifier or encoder of timm from a folder or Hub repository that TimmWrapper wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.data.config import resolve_data_config
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, build_base
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.base import BaseModel, draw_base, label_fields, without_head
from isoprune_hf.models.head import with_new_head
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions
from isoprune_hf.models.timm_base import TimmModule, checked_args, reading, wrap_timm


def has_wrapper_prefix(file: Path) -> bool:
    """Return whether the tensors in a file have the names that TimmWrapper gives them."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return all(name.startswith("timm_model.") for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False  # the loader reports the damage


def open_wrapped(source: BaseSource, options: LoadOptions) -> BaseModel:
    """Open a folder or Hub repository.

    Raises:
        RecipeError: Its config or weights are damaged or could not be fetched, or it has no head and none is asked
            for.
    """
    config, labels = _read_config(source)
    is_headless = not labels
    if is_headless:
        if options.num_labels is None:
            raise without_head(source.place)
        labels = options.head_labels(options.num_labels)
        config.num_labels = len(labels)
    args = config.model_args or {}
    if not isinstance(config.architecture, str):
        raise RecipeError(
            f"model: {source.place}/config.json: architecture is {config.architecture!r:.99}, needs a text"
        )
    with torch.device("meta"):  # refuses an unknown or oversized model before memory is allocated
        build_base(_base_config(config, labels))
    untrained: frozenset[str] = frozenset()
    if options.pretrained:
        module, untrained = _read_module(source, config)
        is_headless = is_headless or bool(untrained)
        if is_headless and options.num_labels is None:
            raise without_head(source.place)
    else:
        module = draw_base(_base_config(config, labels), options.seed)
    noted = getattr(config, "pretrained_cfg", None) or module.pretrained_cfg
    with reading(source.place):
        data = resolve_data_config(pretrained_cfg=noted)  # type: ignore[no-untyped-call]  # untyped in timm
    base = wrap_timm(TimmModule(module, config.architecture, args, data, labels))
    base.model.config.problem_type = config.problem_type
    return with_new_head(base, source, options, untrained) if is_headless else base


def _read_config(source: BaseSource) -> tuple[TimmWrapperConfig, tuple[str, ...]]:
    """Read the config and its label names; an encoder may have none."""
    place = source.place
    with reading(place):
        config = TimmWrapperConfig.from_pretrained(place, revision=source.revision or "main")
        named = {int(index): name for index, name in (config.id2label or {}).items()}
        labels = tuple(named[index] for index in range(config.num_labels or 0))
    args = config.model_args or {}
    if not isinstance(args, dict):
        raise RecipeError(f"model: {place}/config.json: model_args must be a mapping, got {args!r:.99}")
    checked_args(args)
    config.model_args = args
    return config, labels


def _base_config(config: TimmWrapperConfig, labels: Sequence[str]) -> IsoPruneConfig:
    base = {"library": "timm", "architecture": config.architecture, "args": config.model_args}
    return IsoPruneConfig(base=base, **label_fields(labels))


def _read_module(source: BaseSource, config: TimmWrapperConfig) -> tuple[nn.Module, frozenset[str]]:
    """Read the module, and return it with the names of the tensors of a head that the file does not contain.

    The lists in `config.model_args` become tuples, in place, as the builder gets them.
    """
    config.model_args = checked_args(config.model_args or {})
    place = source.place
    with reading(place):
        loaded: Any = TimmWrapperForImageClassification.from_pretrained(
            place,
            config=config,
            revision=source.revision or "main",
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
        missing = frozenset(name.removeprefix("timm_model.") for name in info["missing_keys"])
        if missing:
            with torch.device("meta"):
                encoder = TimmWrapperModel(config).timm_model
            known = encoder.state_dict().keys()
            if missing != model.timm_model.state_dict().keys() - known:
                lost = min(missing & known or missing)
                raise RecipeError(f"model: {place} has no trained weights for timm_model.{lost}")
    module: nn.Module = model.timm_model
    return module, missing
