# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""A pruned image classifier: a base architecture plus what differs from it.

This file travels with the weights, so it imports nothing of isoprune_hf and holds all that loading needs: the errors, the config,
the structure, the model and the image processor. It stays one file: config and model in two files become two different config
classes when transformers loads them from a local folder.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_backends import PilBackend
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

try:
    import timm
except ImportError:
    timm = None
try:
    import torchvision
except ImportError:
    torchvision = None

FORMAT_VERSION = 1
AUTO_MAP = {
    "AutoConfig": "modeling_isoprune.IsoPruneConfig",
    "AutoModelForImageClassification": "modeling_isoprune.IsoPruneForImageClassification",
}
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "modeling_isoprune.IsoImageProcessor"}
# Arguments of timm and torchvision builders that would read files or the network, or change the kind of model.
_FORBIDDEN_ARGS = frozenset(
    "pretrained weights weights_backbone checkpoint_path cache_dir pretrained_cfg pretrained_cfg_overlay pretrained_strict "
    "features_only scriptable exportable no_jit num_classes".split()
)


class IsoPruneError(Exception):
    """Base of every error that a user of isoprune_hf can mend."""


class CheckpointError(IsoPruneError, ValueError):
    """A saved folder is damaged, hostile, or newer than this code; the message names the entry."""


class IsoPruneConfig(PreTrainedConfig):
    """Configuration of a pruned image classifier.

    Args:
        base: The dense architecture: `library` (`timm`, `torchvision` or `transformers`), then `architecture` and `args`, or, for
            transformers, its whole `config`.
        source: Where the dense weights come from: `name`, `pretrained`, `seed`, `num_labels`, `model_args` and a `fingerprint`.
        structure: What differs from the base: `shapes` of tensors, plain `attributes` of modules, `removed` modules.
        image_size: Input the model was built for: (channels, height, width).
        cost: `{"base": {"macs", "params"}, "pruned": {"macs", "params"}}` for one image of `image_size`.
        recipe: The settings that made the cut.
        stage: `base`, `pruned` or `finetuned`.
        format_version: Version of this format; files of a newer version are refused.
    """

    model_type = "isoprune"
    base: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    structure: dict[str, Any] | None = None
    image_size: list[int] | None = None
    cost: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    stage: str = "base"
    format_version: int = FORMAT_VERSION


class SkippedBlock(nn.Module):
    """Stands where a removed residual block stood: hands on its first input."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def build_base(config: IsoPruneConfig) -> nn.Module:
    """Build the dense architecture that `config.base` names, on the current default device, without pretrained weights.

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
        if key in _FORBIDDEN_ARGS or not _is_plain(value):
            raise CheckpointError(f"config.base.args: {key}={value!r} is not allowed")
    library = timm if base["library"] == "timm" else torchvision
    if library is None:
        raise ImportError(f"this checkpoint's base is {base['library']}/{name}: pip install {base['library']}")
    known = timm.is_model(name) if library is timm else name in torchvision.models.list_models(torchvision.models)
    if not known:
        raise CheckpointError(f"config.base.architecture: {library.__name__} {library.__version__} has no model {name!r}")
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    try:
        if library is timm:
            return timm.create_model(name, pretrained=False, num_classes=config.num_labels, **args)
        return torchvision.models.get_model(name, weights=None, num_classes=config.num_labels, **args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"config.base: {name} with {args} cannot be built: {error}") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _build_transformers(values: Any, num_labels: int) -> nn.Module:
    if not isinstance(values, dict) or values.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError("config.base.config: not a configuration of an installed transformers model")
    inner = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    if type(inner) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or inner.model_type == "timm_wrapper":
        raise CheckpointError(f"config.base.config: {inner.model_type} is not a transformers image classifier")
    if inner.num_labels != num_labels:
        inner.num_labels = num_labels
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(inner)]
    classes = classes if isinstance(classes, tuple) else (classes,)
    named = {cls.__name__: cls for cls in classes}
    return named.get((inner.architectures or [None])[0], classes[0])(inner)


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
        if not isinstance(shape, list) or len(shape) != len(full):
            raise CheckpointError(f"{where}: {shape} has another rank than the base's {full}")
        if any(type(size) is not int or not 1 <= size <= limit for size, limit in zip(shape, full, strict=True)):
            raise CheckpointError(f"{where}: {shape} is not within 1 and the base's {full}")
    for path, entries in attributes.items():
        if path not in modules or not isinstance(entries, dict):
            raise CheckpointError(f"config.structure.attributes[{path!r}]: the base has no such module")
        for name, value in entries.items():
            _check_attribute(f"config.structure.attributes[{path!r}][{name!r}]", vars(modules[path]), name, value)
    for path in removed:
        if not path or path not in modules:
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
        if type(number) is int and not 1 <= number <= max(limit, 1):
            raise CheckpointError(f"{where}: {value!r} is not within 1 and the base's {old!r}")
        if type(number) is float and not (math.isfinite(number) and number > 0):
            raise CheckpointError(f"{where}: {value!r} is not a positive finite number")


def apply_structure(model: nn.Module, structure: dict[str, Any] | None) -> nn.Module:
    """Change `model` in place to the given structure; tensors keep their leading elements. Works on the meta device too.

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

    An empty structure is the dense base itself, so base and pruned model are one class with one forward and one label map.
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
            raise CheckpointError(
                f"config.format_version: {config.format_version!r}, this code reads 1 to {FORMAT_VERSION}; update isoprune_hf"
            )
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

    def get_input_embeddings(self) -> None:
        return None

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
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
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as any transformers model; safetensors only, and every tensor must match.

        Raises:
            CheckpointError: An entry of the config or a tensor of the file does not fit.
        """
        kwargs["use_safetensors"] = True
        return super().from_pretrained(*args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # The last moment at which the model is on meta and nothing has been allocated.
        _check_tensors(model, state_dict, checkpoint_files or [])
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save config, weights and this file, so that the folder opens with and without isoprune_hf."""
        # Module names are the names in the file: the structure speaks of them, and loading compares them.
        kwargs["save_original_format"] = False
        self.config.auto_map = {**AUTO_MAP, **({} if self.config.base["library"] == "transformers" else PROCESSOR_AUTO_MAP)}
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            target = Path(save_directory) / "modeling_isoprune.py"
            if target.resolve() != Path(__file__).resolve():
                shutil.copyfile(__file__, target)


def _check_tensors(model: nn.Module, state_dict: dict[str, torch.Tensor] | None, files: list[str]) -> None:
    found = {name: list(tensor.shape) for name, tensor in (state_dict or {}).items()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found.update({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
        except Exception as error:  # noqa: BLE001 - safetensors has no public error class but Exception's child
            raise CheckpointError(f"{Path(file).name}: not a readable safetensors file ({error})") from error
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"tensor {name!r} is missing from the checkpoint")
        if name not in expected:
            raise CheckpointError(f"tensor {name!r} does not belong to this model")
        if found[name] != expected[name]:
            raise CheckpointError(f"tensor {name!r} has shape {found[name]}, the config says {expected[name]}")


class IsoImageProcessor(PilBackend):
    """Image processor that gives exactly the pixels of the evaluation transform of timm and torchvision.

    Differs from the processors of transformers by the centre crop, which rounds half to even as torchvision does.
    """

    resample = 3
    size = {"shortest_edge": 256}
    crop_size = {"height": 224, "width": 224}
    image_mean = [0.485, 0.456, 0.406]
    image_std = [0.229, 0.224, 0.225]
    default_to_square = False
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def center_crop(self, image, size, **kwargs):
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            return super().center_crop(image, size, **kwargs)
        top, left = round((height - size.height) / 2.0), round((width - size.width) / 2.0)
        return image[..., top : top + size.height, left : left + size.width]
