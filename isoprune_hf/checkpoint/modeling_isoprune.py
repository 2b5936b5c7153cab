# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""A pruned image classifier: a base architecture plus what differs from it.

This file travels with the weights, so it imports nothing of isoprune_hf and holds all that loading needs. It stays one
file: config and model in two become two different config classes when transformers loads them from a local folder.
"""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_backends import PilBackend
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import can_return_tuple

try:
    import timm
except ImportError:
    timm = None
try:
    import torchvision
except ImportError:
    torchvision = None

FORMAT_VERSION = 1
# Arguments of timm and torchvision builders that would read files or the network, or change the kind of model.
_FORBIDDEN = re.compile("pretrained.*|weights.*|checkpoint_path|cache_dir|features_only|scriptable|num_classes")


# What the builders of the three libraries raise for arguments that they do not take.
_BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_BUILD_ERRORS += (StrictDataclassError,)


class IsoPruneError(Exception):
    """Base of every error that a user of isoprune_hf can mend."""


class CheckpointError(IsoPruneError, ValueError):
    """A saved folder is damaged, hostile, or newer than this code; the message names the entry."""


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
    format_version: int = FORMAT_VERSION


class SkippedBlock(nn.Module):
    """Stands where a removed residual block stood: hands on its first input."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def build_base(config: IsoPruneConfig) -> nn.Module:
    """Build the dense architecture of `config.base` on the current default device, without trained weights.

    Raises:
        CheckpointError: The entry is not a base that can be built safely.
    """
    base = config.base
    if not isinstance(base, dict) or base.get("library") not in ("timm", "torchvision", "transformers"):
        raise CheckpointError(f"config.base: library must be timm, torchvision or transformers, got {base!r}")
    if base["library"] == "transformers":
        return _build_transformers(base.get("config"), config.num_labels)
    name, args = base.get("architecture"), base.get("args") or {}
    if not isinstance(name, str) or not isinstance(args, dict):
        raise CheckpointError("config.base: needs a string `architecture` and a mapping `args`")
    for key, value in args.items():
        if _FORBIDDEN.fullmatch(str(key)) or not _is_plain(value):
            raise CheckpointError(f"config.base.args: {key}={value!r} is not allowed")
    library = timm if base["library"] == "timm" else torchvision
    if library is None:
        raise ImportError(f"this checkpoint's base is {base['library']}/{name}: pip install {base['library']}")
    if not (timm.is_model(name) if library is timm else name in torchvision.models.list_models(torchvision.models)):
        raise CheckpointError(f"config.base.architecture: {base['library']} {library.__version__} has no {name!r}")
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    build = timm.create_model if library is timm else torchvision.models.get_model
    try:  # neither loads weights unless told to
        return build(name, num_classes=config.num_labels, **args)
    except _BUILD_ERRORS as error:
        raise CheckpointError(f"config.base: {name} with {args} cannot be built: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _build_transformers(values: Any, num_labels: int) -> nn.Module:
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError("config.base.config: not a configuration of an installed transformers model")
    # Names of implementations could fetch kernels, and private entries are not architecture.
    values = {k: v for k, v in values.items() if not re.match("_|.*implementation|auto_map|quantization", str(k))}
    config_class = CONFIG_MAPPING[kind]
    if config_class not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or kind in ("timm_wrapper", "isoprune"):
        raise CheckpointError(f"config.base.config: {kind} is not a transformers image classifier")
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[config_class]
    named = {cls.__name__: cls for cls in (classes if isinstance(classes, tuple) else (classes,))}
    try:
        inner = config_class.from_dict(values)
        inner.num_labels = num_labels
        return named.get((inner.architectures or [None])[0], next(iter(named.values())))(inner)
    except _BUILD_ERRORS as error:
        raise CheckpointError(f"config.base.config: {kind} cannot be built: {_one_line(error)}") from error


def check_structure(base: nn.Module, structure: dict[str, Any]) -> None:
    """Check that `structure` can be put on `base`: nothing grows, nothing is invented, no type changes.

    Raises:
        CheckpointError: Names the first entry that is wrong.
    """
    if not isinstance(structure, dict) or set(structure) - {"shapes", "attributes", "removed"}:
        raise CheckpointError("config.structure: must hold only shapes, attributes and removed")
    shapes, attributes = structure.get("shapes") or {}, structure.get("attributes") or {}
    removed = structure.get("removed") or []
    if not isinstance(shapes, dict) or not isinstance(attributes, dict) or not isinstance(removed, list):
        raise CheckpointError("config.structure: shapes and attributes are mappings, removed is a list")
    tensors, modules = base.state_dict(), dict(base.named_modules())
    for name, shape in shapes.items():
        where = f"config.structure.shapes[{name!r}]"
        if name not in tensors:
            raise CheckpointError(f"{where}: the base has no such tensor")
        full = list(tensors[name].shape)
        fits = isinstance(shape, list) and len(shape) == len(full)
        if not fits or any(type(n) is not int or not 1 <= n <= limit for n, limit in zip(shape, full, strict=True)):
            raise CheckpointError(f"{where}: {shape!r} is no shape within the base's {full}")
    for path, entries in attributes.items():
        if path not in modules or not isinstance(entries, dict):
            raise CheckpointError(f"config.structure.attributes[{path!r}]: the base has no such module")
        for name, value in entries.items():
            _check_attribute(f"config.structure.attributes[{path!r}][{name!r}]", vars(modules[path]), name, value)
    for path in removed:
        inside = isinstance(path, str) and any(path != p and path.startswith(f"{p}.") for p in removed)
        if not isinstance(path, str) or not path or path not in modules or inside:
            raise CheckpointError(f"config.structure.removed: the base has no module {path!r}")


def _check_attribute(where: str, owner: dict[str, Any], name: str, value: Any) -> None:
    if name.startswith("_") or name not in owner:
        raise CheckpointError(f"{where}: the base module has no such attribute")
    old = owner[name]
    value = tuple(value) if isinstance(value, list) and isinstance(old, tuple) else value
    numbers, olds = (value, old) if isinstance(old, tuple) else ((value,), (old,))
    if type(value) is not type(old) or len(numbers) != len(olds):
        raise CheckpointError(f"{where}: {value!r} is not of the base's type {type(old).__name__}")
    for number, limit in zip(numbers, olds, strict=True):
        if type(number) is not type(limit) or type(number) not in (int, float):
            raise CheckpointError(f"{where}: only numbers may differ from the base, got {value!r}")
        largest = limit if type(number) is int else math.inf
        if not 0 < number <= largest or number == math.inf:
            raise CheckpointError(f"{where}: {value!r} is not positive or above the base's {old!r}")


def apply_structure(model: nn.Module, structure: dict[str, Any] | None) -> nn.Module:
    """Change `model` in place to the structure; tensors keep their leading elements. Works on the meta device too.

    Raises:
        CheckpointError: See `check_structure`.
    """
    structure = structure or {}
    check_structure(model, structure)
    for name, shape in (structure.get("shapes") or {}).items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        tensor = getattr(owner, leaf)
        kept = tensor.detach()[tuple(slice(size) for size in shape)].clone()
        setattr(owner, leaf, nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept)
    for path, entries in (structure.get("attributes") or {}).items():
        owner = model.get_submodule(path)
        for name, value in entries.items():
            setattr(owner, name, tuple(value) if isinstance(value, list) else value)
    for path in structure.get("removed") or []:
        model.set_submodule(path, SkippedBlock())
    return model


class IsoPruneForImageClassification(PreTrainedModel):
    """An image classifier whose architecture is `config.base` changed by `config.structure`.

    An empty structure is the dense base itself: base and pruned are one class with one forward and one label map.
    """

    config_class = IsoPruneConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True

    def __init__(self, config: IsoPruneConfig):
        super().__init__(config)
        if type(config.format_version) is not int or not 1 <= config.format_version <= FORMAT_VERSION:
            known = f"this code reads 1 to {FORMAT_VERSION}; update isoprune_hf"
            raise CheckpointError(f"config.format_version: {config.format_version!r}, {known}")
        self.model = apply_structure(build_base(config), config.structure)
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            # The base has drawn its own weights; transformers would draw them a second time, otherwise.
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):  # timm: index tables and masks that are not in the file
            module.init_non_persistent_buffers()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: Images of shape (B, C, H, W), normalised by the folder's image processor.
            labels: Class indices of shape (B,); the loss is the cross-entropy.

        Returns:
            `loss` (if there are labels) and `logits` of shape (B, num_labels).
        """
        output = self.model(pixel_values.to(self.dtype))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as any transformers model; safetensors only, and every tensor must match.

        Raises:
            CheckpointError: An entry of the config or a tensor of the file does not fit.
        """
        kwargs["use_safetensors"] = True
        try:
            return super().from_pretrained(*args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"model.safetensors: not a readable safetensors file ({error})") from error

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # The last moment at which the model is on meta and nothing has been allocated.
        _check_tensors(model, state_dict, checkpoint_files or [])
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save config, weights and this file, so that the folder opens with and without isoprune_hf."""
        # Module names are the names in the file: the structure speaks of them, and loading compares them.
        kwargs["save_original_format"] = False
        names = {"AutoConfig": "IsoPruneConfig", "AutoModelForImageClassification": type(self).__name__}
        if self.config.base["library"] != "transformers":  # those keep their own processor
            names["AutoImageProcessor"] = "IsoImageProcessor"
        self.config.auto_map = {auto: f"modeling_isoprune.{name}" for auto, name in names.items()}
        super().save_pretrained(save_directory, **kwargs)
        target = Path(save_directory) / "modeling_isoprune.py"
        if kwargs.get("is_main_process", True) and target.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, target)


def _check_tensors(model: nn.Module, state_dict: dict[str, torch.Tensor] | None, files: list[str]) -> None:
    found = {name: list(tensor.shape) for name, tensor in (state_dict or {}).items()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found.update({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{Path(file).name}: not a readable safetensors file ({error})") from error
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        have, want = found.get(name, "no such tensor"), expected.get(name, "no such tensor")
        if have != want:
            raise CheckpointError(f"tensor {name!r}: the checkpoint has {have}, the config says {want}")


class IsoImageProcessor(PilBackend):
    """Image processor that gives exactly the pixels of the evaluation transform of timm and torchvision.

    Differs from the processors of transformers by the centre crop, which rounds half to even as torchvision does.
    """

    size, crop_size = {"shortest_edge": 256}, {"height": 224, "width": 224}
    resample, default_to_square = 3, False
    image_mean, image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    do_convert_rgb = do_resize = do_center_crop = do_rescale = do_normalize = True

    def to_dict(self):
        values = super().to_dict()
        del values["image_processor_type"]
        return values

    def convert_to_rgb(self, image, input_data_format=None):
        if isinstance(image, Image.Image):
            return np.array(image.convert("RGB"))
        return super().convert_to_rgb(image, input_data_format)

    def center_crop(self, image, size, **kwargs):
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            return super().center_crop(image, size, **kwargs)
        top, left = round((height - size.height) / 2.0), round((width - size.width) / 2.0)
        return image[..., top : top + size.height, left : left + size.width]
