# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""The config of a pruned image classifier and its dense base (part of the shipped file).

`IsoPruneConfig` validates every entry when it is created. `build_base` builds the dense architecture that the config
names, without reading files or the network.
"""

import itertools
import math
from collections.abc import Callable, Collection
from functools import partial
from importlib import import_module
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING, PreTrainedConfig

from isoprune_hf.checkpoint.image_pass import take_images
from isoprune_hf.checkpoint.meta import build_on_meta
from isoprune_hf.checkpoint.nested_config import IGNORED_ENTRIES, check_config
from isoprune_hf.checkpoint.own_network import find_builder, inputs_of, with_classes
from isoprune_hf.checkpoint.plain_values import check_args, require
from isoprune_hf.checkpoint.settings import apply_settings
from isoprune_hf.checkpoint.task_forms import TaskForm, networks_of, task_of
from isoprune_hf.errors import CheckpointError
from isoprune_hf.limits import MAX_CONFIG_NUMBER, MAX_IMAGE_SIDE, MAX_INPUT_NUMBERS, MAX_MODULES

FORMAT_VERSION = 3  # the newest that this code reads
_LIBRARIES = ("timm", "torchvision", "transformers", "python")
_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
_WEIGHT_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
# Exceptions that torch, timm, torchvision and transformers raise for arguments, configs or inputs that they cannot
# use. They hardly validate, so the type is that of the first operation that fails. Wrap only calls into these
# libraries: around code of this package the tuple would hide bugs.
LIBRARY_ERRORS = (
    ArithmeticError,  # division by a size of 0
    AssertionError,  # checks of timm, such as an embed_dim that num_heads does not divide
    AttributeError,  # a string or number in place of a config or module
    LookupError,  # an unknown activation or layer name, a list that is too short
    RuntimeError,  # tensors of negative size, shapes that do not match
    StopIteration,  # the first entry of an empty mapping
    TypeError,  # an unknown or missing argument
    ValueError,  # a value out of range
    StrictDataclassError,  # a config field of the wrong type
)


def describe_error(error: Exception) -> str:
    """Return the class and the message of an exception as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class IsoPruneConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__ is untyped
    """Configuration of a pruned image classifier: the dense base and its differences from the base."""

    model_type = "isoprune"
    # `library` (timm, torchvision, transformers or python), with `architecture` and `args`; for transformers with
    # `config`. The architecture of python is `package.module:builder`, with its classes as `num_labels`, and name and
    # shape of several inputs as `inputs`. `task`, if it is not image classification, see `task_forms.py`. `settings`
    # and `modules` for what the arguments do not tell, see `settings.py`.
    base: dict[str, Any] | None = None
    # Origin of the dense weights: `name` (with `revision`, or `weights` for a file), `pretrained`, `seed`,
    # `model_args`, `num_labels`; `fingerprint`; `changed` if they were trained after they were opened.
    source: dict[str, Any] | None = None
    # Differences from the base: tensor `shapes`, plain module `attributes`, and `removed` modules.
    structure: dict[str, Any] | None = None
    image_size: list[int] | None = None  # (channels, height, width) of the input
    cost: dict[str, Any] | None = None  # `macs` and `params` of `base` and `pruned`, for one image
    recipe: dict[str, Any] | None = None  # settings that produced this model
    stage: str = "base"  # base, pruned or finetuned
    layout: str = "per-layer"  # or uniform: `base.config` itself has the pruned sizes, and there is no structure
    out_features: list[str] | None = None  # stages of a backbone
    out_indices: list[int] | None = None
    # The oldest code that reads this folder right: 2 reads `settings` and `modules`, and 3 `task`.
    format_version: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        hidden = {
            name for name in kwargs if IGNORED_ENTRIES.fullmatch(name) or callable(getattr(type(self), name, None))
        }
        kwargs = {name: value for name, value in kwargs.items() if name not in hidden}
        _check_entries({**kwargs, **vars(self)})
        if self.id2label is not None:
            self.label2id = {name: int(index) for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # untyped in transformers

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a config; `attn_implementation` is taken from the caller alone, not from a file."""
        requested = kwargs.pop("attn_implementation", None)
        found = super().from_dict(config_dict, **kwargs)
        if requested is not None:
            (found[0] if isinstance(found, tuple) else found)._attn_implementation = requested
        return found


def _check_entries(entries: dict[str, Any]) -> None:
    """Check the entries on which transformers would fail and those that other code relies on."""
    version = entries["format_version"]
    require(
        type(version) is int and 1 <= version <= FORMAT_VERSION,
        f"config.format_version: {version!r} is not supported, this code reads 1 to {FORMAT_VERSION}; "
        "update isoprune_hf",
    )
    for name in ("base", "source", "structure", "cost", "recipe"):
        require(isinstance(entries[name], dict | None), f"config.{name}: {entries[name]!r:.99} is not a mapping")
    stage = entries["stage"]
    require(isinstance(stage, str), f"config.stage: {stage!r:.99} is not a string")
    layout = entries["layout"]
    require(
        layout in ("per-layer", "uniform"), f"config.layout: {layout!r:.99} is not supported; use per-layer or uniform"
    )
    size = entries["image_size"]
    lengths = range(1, 6) if (entries["base"] or {}).get("library") == "python" else (3,)
    is_size = size is None or _is_image_size(size, lengths)
    require(is_size, f"config.image_size: {size!r:.99} is not [channels, height, width]")
    inputs_of(entries["base"], size)
    labels = entries["id2label"]
    require(
        labels is None or _are_labels(labels),
        f"config.id2label: {labels!r:.99} does not map the class indices 0, 1, 2, ... to names",
    )
    count = entries.get("num_labels")
    require(
        count is None or (type(count) is int and 1 <= count <= MAX_CONFIG_NUMBER),
        f"config.num_labels: {count!r:.99} is not a number of classes from 1 to {MAX_CONFIG_NUMBER}",
    )
    kind = entries.get("problem_type")
    require(
        kind is None or kind in _PROBLEM_TYPES,
        f"config.problem_type: {kind!r:.99} is not supported; use {', '.join(_PROBLEM_TYPES)}",
    )
    dtype = entries["dtype"]
    dtype = entries.get("torch_dtype") if dtype is None else dtype
    require(
        dtype is None or f"{'torch.' if isinstance(dtype, str) else ''}{dtype}" in map(str, _WEIGHT_DTYPES),
        f"config.dtype: {dtype!r:.99} is not supported; use float64, float32, float16 or bfloat16",
    )


def _is_image_size(size: Any, lengths: Collection[int]) -> bool:
    is_list = isinstance(size, list) and len(size) in lengths
    is_sized = is_list and all(type(number) is int and 1 <= number <= MAX_IMAGE_SIDE for number in size)
    return is_sized and math.prod(size) <= MAX_INPUT_NUMBERS


def _are_labels(labels: Any) -> bool:
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        return False
    return {*map(str, labels)} == {*map(str, range(len(labels)))} != set()


def build_base(config: IsoPruneConfig) -> nn.Module:
    """Build the dense architecture of `config.base` on the current default device, without trained weights.

    On the meta device, tensors that are not saved keep their values on the CPU, see `meta.build_on_meta`.

    Raises:
        CheckpointError: The entry does not describe a base that can be built safely.
    """
    base = config.base
    library = base.get("library") if isinstance(base, dict) else None
    if base is None or not isinstance(library, str) or library not in _LIBRARIES:
        raise CheckpointError(f"config.base: library must be one of {', '.join(_LIBRARIES)}, got {base!r}")
    form = task_of(base)
    require(library in form.libraries, f"config.base: {library} has no networks for {form.task}")
    if library == "transformers":
        network = _build_transformers(base.get("config"), form, config.num_labels, config._attn_implementation)
    else:
        network = _build_by_name(library, base, config.num_labels if form.has_classes else 0)
    return apply_settings(network, base)


def _build_by_name(library: str, base: dict[str, Any], num_labels: int | None) -> nn.Module:
    """Build an architecture of timm or torchvision, which load no weights unless told to, or one of the caller."""
    name = base.get("architecture")
    args = {} if base.get("args") is None else base["args"]
    if not isinstance(name, str) or not isinstance(args, dict):
        raise CheckpointError("config.base: `architecture` must be a string and `args` a mapping")
    args = check_args(args, is_own=library == "python")
    complaint = f"config.base: {name} with {args} cannot be built"
    if library == "python":
        args = with_classes(args, base.get("num_labels"), num_labels)
        network = build_limited(complaint, partial(find_builder(name), **args))
        require(isinstance(network, nn.Module), f"{complaint}: the builder returns {type(network).__name__}")
        return network
    try:
        module = import_module(library)
    except ImportError as error:
        raise ImportError(f"this checkpoint is based on {library}/{name}: pip install {library}") from error
    is_timm = library == "timm"
    known = module.is_model(name) if is_timm else name in module.models.list_models(module.models)
    require(known, f"config.base.architecture: {library} {module.__version__} has no {name!r}")
    create = module.create_model if is_timm else module.models.get_model
    return build_limited(complaint, lambda: create(name, num_classes=num_labels, **args))


def _build_transformers(
    values: Any, form: TaskForm, num_labels: int | None, attention: str | dict[str, Any] | None
) -> nn.Module:
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"config.base.config: model_type {kind!r:.99} is not known to the installed transformers; if it is a "
            "custom type, import the module that registers it first"
        )
    config_class = CONFIG_MAPPING[kind]
    named = {cls.__name__: cls for cls in networks_of(form, config_class)}
    named_task = "a transformers image classifier" if form.has_classes else f"a model of transformers for {form.task}"
    known = bool(named) and kind not in ("timm_wrapper", "isoprune")
    require(known, f"config.base.config: {kind} is not {named_task}")
    values = check_config(config_class, values)

    def build() -> nn.Module:
        inner = config_class.from_dict(values)
        if form.names_classes:
            inner.num_labels = num_labels  # type: ignore[assignment]  # transformers types only the getter as optional
        inner.return_dict = True
        if attention not in (None, "sdpa"):  # which transformers sets by itself, also where the base has no sdpa
            inner._attn_implementation = attention
        architecture = (inner.architectures or [""])[0]
        model: nn.Module = named.get(architecture, next(iter(named.values())))(inner)
        model = _tied(model)
        return take_images(model) if form.reads_texts else model

    return build_limited(f"config.base.config: {kind} cannot be built", build)


def _tied(network: Any) -> nn.Module:
    """Share the tensors that a network of transformers shares, in place; return it.

    Its constructor does so, too, but not within `from_pretrained`, where a cut needs to know which are shared.
    """
    for name, source in network.get_expanded_tied_weights_keys(all_submodels=True).items():
        path, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(path), leaf, network.get_parameter(source))
    tied: nn.Module = network
    return tied


def build_limited(complaint: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Call a builder of a library, and stop it at `MAX_MODULES` modules.

    Args:
        complaint: Beginning of the error message.
        build: Calls the builder, and nothing else.

    Raises:
        CheckpointError: The builder failed; the message ends with the error of the library.
    """
    try:
        if torch.get_default_device().type == "meta":
            return build_on_meta(partial(_count_modules, build))
        return _count_modules(build)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(f"{complaint}: {describe_error(error)}") from error


def _count_modules(build: Callable[[], nn.Module]) -> nn.Module:
    """Call a builder; raises a ValueError at `MAX_MODULES` modules."""
    registered = itertools.count(1)

    def limit(*_: Any) -> None:
        if next(registered) > MAX_MODULES:
            raise ValueError(f"more than {MAX_MODULES} modules")

    hook = register_module_module_registration_hook(limit)
    try:
        return build()
    finally:
        hook.remove()
