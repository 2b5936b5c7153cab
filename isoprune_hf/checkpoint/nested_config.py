# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Check a config of transformers before its class reads it, nested configs included (part of the shipped file).

Classes of transformers fetch what some entries name, also while a config is only read: a backbone from the Hub, a
kernel of attention, a nested config of any kind that does so in turn.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_BACKBONE_MAPPING

from isoprune_hf.checkpoint.plain_values import is_plain, require

# Entries that do not describe an architecture: implementation names could fetch kernels, and transformers acts on the
# others.
IGNORED_ENTRIES = re.compile("_.*|.*implementation|quantization.*|layer_types|per_layer_config|use_return_dict")
_LABELS = ("id2label", "label2id")  # any texts
_BACKBONE = "backbone_config"
_TIMM = "timm_backbone"
_TIMM_NAME = re.compile(
    r"[\w.]+", re.ASCII
)  # an architecture of timm, built without its weights; others are addresses
# Kinds whose configs may name an architecture of timm in place of a config of the backbone.
_NAMING_TIMM = ("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer")
_SIZES_OF_BACKBONE = "out_indices|featmap_shape|channel_list|feature_sizes"
_FETCHING = re.compile(
    f"backbone(?!_({_SIZES_OF_BACKBONE})$).*|use_(pretrained|timm)_backbone|auto_map|trust_remote_code"
)
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://.*|(hf[-_]hub|local-dir):.*", re.DOTALL)


def check_config(config_class: Any, values: dict[str, Any], place: str = "config.base.config") -> dict[str, Any]:
    """Check the entries of a config, and return those that describe an architecture.

    Args:
        config_class: Class that will read them.
        values: The entries.
        place: Place of the config, for error messages.

    Raises:
        CheckpointError: An entry is not a plain value, is an address or names something to fetch, or a nested config
            is of another kind than the class has at this place, or of none that it fixes. A backbone is one of
            transformers, of any kind, or the encoder that the class has by default, or an architecture of timm.
    """
    nested = {name: getattr(kind, "model_type", None) for name, kind in config_class.sub_configs.items()}
    for name, kind in nested.items():
        is_known = bool(kind) or name == _BACKBONE
        require(is_known, f"{place}: {config_class.model_type} has a {name} of any kind and is not supported")
    checked = {}
    harmless = _names_of_timm(config_class.model_type, values)
    for name, value in values.items():
        if IGNORED_ENTRIES.fullmatch(name) or name == "auto_map":
            continue
        if name in harmless:
            checked[name] = value
            continue
        require(is_plain(value), f"{place}: {name}={value!r:.99} is not allowed")
        if name in nested and isinstance(value, dict):
            wanted = nested[name]
            found = value.get("model_type", wanted)
            kind = config_class.sub_configs[name] if wanted else _backbone_of(config_class, found, f"{place}.{name}")
            require(wanted in (None, found), f"{place}.{name}: model_type {found!r:.99} is not {wanted!r}")
            checked[name] = check_config(kind, value, f"{place}.{name}")
            continue
        for key, text in entries_of(name, value):
            is_kind = key == "model_type" != name
            fetches = is_kind or (_FETCHING.fullmatch(key) and text not in (None, False))
            is_address = name not in _LABELS and isinstance(text, str) and _ADDRESS.fullmatch(text)
            require(not fetches and not is_address, f"{place}: {name}={value!r:.99} is not allowed")
        checked[name] = value
    return checked


def _backbone_of(config_class: Any, model_type: Any, place: str) -> Any:
    """Return the class of the config of a backbone of transformers, or of the encoder that a class has in its place.

    Raises:
        CheckpointError: It is neither, or a wrapper of timm, which would pass any arguments to timm.
    """
    kind = CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None
    default = config_class.sub_configs_defaults.get(_BACKBONE)
    is_default = default is not None and model_type == default.model_type != "timm_wrapper"
    is_backbone = kind is not None and (kind in MODEL_FOR_BACKBONE_MAPPING or is_default)
    require(is_backbone, f"{place}: model_type {model_type!r:.99} is not a backbone of transformers")
    return kind


def _names_of_timm(kind: str, values: dict[str, Any]) -> Collection[str]:
    """Return the entries that name an architecture of timm, which transformers builds without its weights."""
    name = values.get("backbone")
    if not isinstance(name, str) or not _TIMM_NAME.fullmatch(name):
        return ()
    if kind == _TIMM:
        return ("backbone",)
    is_plain_name = values.get(_BACKBONE) is None and not values.get("backbone_kwargs")
    if kind in _NAMING_TIMM and is_plain_name and values.get("use_timm_backbone", True) is True:
        return ("backbone", "use_timm_backbone", "use_pretrained_backbone")
    return ()


def entries_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entry itself and all entries of mappings in it, with their names; elements of lists by the list's."""
    yield name, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from entries_of(str(key), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from entries_of(name, inner)
