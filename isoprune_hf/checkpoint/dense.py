# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""The config of a pruned image classifier, and the dense base that it names: a part of the file that ships."""

import itertools
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedConfig

from isoprune_hf.errors import CheckpointError

FORMAT_VERSION = 1
# Far above every number in a config of an image classifier, and every count of modules.
LARGEST_NUMBER, MOST_MODULES = 2**20, 20_000
# Arguments of timm and torchvision builders that would read files or the network, or change the kind of model.
_FORBIDDEN = re.compile("pretrained.*|weights.*|checkpoint_path|cache_dir|features_only|scriptable|num_classes")
# Entries that are no architecture: names of implementations could fetch kernels, and transformers acts on the others.
_IGNORED = re.compile("_.*|.*implementation|quantization.*|layer_types|per_layer_config|use_return_dict")
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
# What the builders of the three libraries raise for arguments that they do not take.
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
BUILD_ERRORS += (StrictDataclassError,)


def require(holds: bool, message: str) -> None:
    """Raise a CheckpointError unless the condition holds."""
    if not holds:
        raise CheckpointError(message)


def cause(error: Exception) -> str:
    """Give the class and message of a library's error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class IsoPruneConfig(PreTrainedConfig):
    """Configuration of a pruned image classifier: its base, and what differs from it."""

    model_type = "isoprune"
    # `library` (timm, torchvision, transformers), then `architecture` and `args`; for transformers its whole `config`.
    base: dict[str, Any] | None = None
    # Where the dense weights come from: `name`, `pretrained`, `seed`, `model_args`, `num_labels`, `fingerprint`.
    source: dict[str, Any] | None = None
    # `shapes` of tensors, plain `attributes` of modules and `removed` modules that differ from the base.
    structure: dict[str, Any] | None = None
    image_size: list[int] | None = None  # (channels, height, width) the model was built for
    cost: dict[str, Any] | None = None  # `macs` and `params` of `base` and `pruned`, for one image
    recipe: dict[str, Any] | None = None  # the settings that made this model
    stage: str = "base"  # base, pruned or finetuned
    layout: str = "per-layer"  # or uniform: a cut whose sizes are those of a stock `base.config`, without a structure
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        hidden = {name for name in kwargs if _IGNORED.fullmatch(name) or callable(getattr(type(self), name, None))}
        kwargs = {name: value for name, value in kwargs.items() if name not in hidden}
        _check_entries({**kwargs, **vars(self)})
        if self.id2label is not None:
            self.label2id = {name: int(index) for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)


def _check_entries(entries: dict[str, Any]) -> None:
    """Check what transformers would stumble over, and what other code counts on."""
    version, size, labels, stage = (entries[name] for name in ("format_version", "image_size", "id2label", "stage"))
    known = f"this code reads 1 to {FORMAT_VERSION}; update isoprune_hf"
    require(type(version) is int and 1 <= version <= FORMAT_VERSION, f"config.format_version: {version!r}, {known}")
    for name in ("base", "source", "structure", "cost", "recipe"):
        require(isinstance(entries[name], dict | None), f"config.{name}: {entries[name]!r:.99} is no mapping")
    require(isinstance(stage, str), f"config.stage: {stage!r:.99} is no name")
    layout = entries["layout"]
    require(layout in ("per-layer", "uniform"), f"config.layout: {layout!r:.99} is neither per-layer nor uniform")
    holds = size is None or (isinstance(size, list) and len(size) == 3)
    holds = holds and all(type(number) is int and 1 <= number <= 2**14 for number in size or [])
    require(holds, f"config.image_size: {size!r:.99} is not [channels, height, width]")
    holds = labels is None or (isinstance(labels, dict) and all(isinstance(name, str) for name in labels.values()))
    holds = holds and (labels is None or {*map(str, labels)} == {*map(str, range(len(labels)))} != set())
    require(holds, f"config.id2label: {labels!r:.99} does not name the classes 0, 1, 2, ...")
    count, dtype = entries.get("num_labels"), entries["dtype"]
    dtype = entries.get("torch_dtype") if dtype is None else dtype
    holds = count is None or (type(count) is int and 1 <= count <= LARGEST_NUMBER)
    require(holds, f"config.num_labels: {count!r:.99} is no number of classes")
    holds = dtype is None or f"{'torch.' if isinstance(dtype, str) else ''}{dtype}" in map(str, _FLOATS)
    require(holds, f"config.dtype: {dtype!r:.99} is no type of floating-point weights")


def build_base(config: IsoPruneConfig) -> nn.Module:
    """Build the dense architecture of `config.base` on the current default device, without trained weights.

    Raises:
        CheckpointError: The entry is not a base that can be built safely.
    """
    base = config.base
    kind = base.get("library") if isinstance(base, dict) else None
    known = isinstance(kind, str) and kind in ("timm", "torchvision", "transformers")
    require(known, f"config.base: library must be timm, torchvision or transformers, got {base!r}")
    if kind == "transformers":
        return _build_transformers(base.get("config"), config.num_labels)
    name, args = base.get("architecture"), {} if base.get("args") is None else base["args"]
    holds = isinstance(name, str) and isinstance(args, dict)
    require(holds, "config.base: needs a string `architecture` and a mapping `args`")
    check_args(args)
    try:
        library = import_module(kind)
    except ImportError as error:
        raise ImportError(f"this checkpoint's base is {kind}/{name}: pip install {kind}") from error
    known = library.is_model(name) if kind == "timm" else name in library.models.list_models(library.models)
    require(known, f"config.base.architecture: {kind} {library.__version__} has no {name!r}")
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    build = library.create_model if kind == "timm" else library.models.get_model
    # Neither loads weights unless told to.
    return build_limited(
        f"config.base: {name} with {args} cannot be built", lambda: build(name, num_classes=config.num_labels, **args)
    )


def _build_transformers(values: Any, num_labels: int) -> nn.Module:
    kind = values.get("model_type") if isinstance(values, dict) else None
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    message = f"config.base.config: {kind!r:.99} is not a configuration of an installed transformers model"
    require(known, f"{message}; if it is your own, import the module that registers it before")
    values = {k: v for k, v in values.items() if not _IGNORED.fullmatch(k) and k != "auto_map"}
    for name, value in values.items():
        require(_is_plain(value, nested=True), f"config.base.config: {name}={value!r:.99} is not allowed")
    config_class = CONFIG_MAPPING[kind]
    known = config_class in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and kind not in ("timm_wrapper", "isoprune")
    require(known, f"config.base.config: {kind} is not a transformers image classifier")
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[config_class]
    named = {cls.__name__: cls for cls in (classes if isinstance(classes, tuple) else (classes,))}

    def build() -> nn.Module:
        inner = config_class.from_dict(values)
        inner.num_labels, inner.return_dict = num_labels, True
        return named.get((inner.architectures or [None])[0], next(iter(named.values())))(inner)

    return build_limited(f"config.base.config: {kind} cannot be built", build)


def check_args(args: dict[str, Any]) -> dict[str, Any]:
    """Check that arguments of a builder are plain, and give them back.

    Raises:
        CheckpointError: One would read files, change the kind of model, or is no plain value of a usual size.
    """
    for key, value in args.items():
        allowed = isinstance(key, str) and not _FORBIDDEN.fullmatch(key) and _is_plain(value)
        require(allowed, f"config.base.args: {key}={value!r:.99} is not allowed")
    return args


def build_limited(complaint: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Call a builder of a library, which may make no more modules than any image classifier has.

    Raises:
        CheckpointError: The complaint, with what the library says.
    """
    registered = itertools.count(1)

    def limit(*_: Any) -> None:
        if next(registered) > MOST_MODULES:
            raise ValueError(f"more than {MOST_MODULES} modules")

    hook = register_module_module_registration_hook(limit)
    try:
        try:
            return build()
        except NotImplementedError:  # a builder that reads a tensor of numbers, which has none on meta
            with _NumbersOnCPU():
                return build()
    except BUILD_ERRORS as error:
        raise CheckpointError(f"{complaint}: {cause(error)}") from error
    finally:
        hook.remove()


class _NumbersOnCPU(TorchFunctionMode):
    """Put written or counted numbers on the CPU whatever the default device: torchvision's RegNets read widths."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.tensor) and _is_plain(args):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _is_plain(value: Any, *, nested: bool = False) -> bool:
    values = list(value.values()) if nested and isinstance(value, dict) else value
    if isinstance(values, list | tuple):
        return all(_is_plain(item, nested=nested) for item in values)
    number = isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER  # neither inf nor nan
    return value is None or isinstance(value, str) or number
