"""Recognise a module of timm, torchvision or transformers that a caller made: `recognise`."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import timm
import torch
import torchvision
from timm.data.config import resolve_data_config
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, TimmWrapperForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from isoprune_hf.checkpoint.dense import build_base
from isoprune_hf.checkpoint.image_pass import class_as_made
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.rebuild import record_settings
from isoprune_hf.checkpoint.task_forms import (
    IMAGE_CLASSIFICATION,
    IMAGE_FEATURE_EXTRACTION,
    TASK_FORMS,
    TaskForm,
    networks_of,
    task_entry,
)
from isoprune_hf.errors import CheckpointError, UnsupportedArchitectureError
from isoprune_hf.models.base import default_labels, label_fields
from isoprune_hf.models.from_torchvision import args_of_module
from isoprune_hf.models.processors import timm_processor
from isoprune_hf.models.timm_base import timm_labels, without_classes


@dataclass(frozen=True, eq=False)
class Recognised:
    """A module that a library can build again.

    Args:
        config: The config that builds it.
        processor: The image processor of its weights; None if the module does not name one.
    """

    config: IsoPruneConfig
    processor: BaseImageProcessor | None = None


def recognise(module: nn.Module, image_size: list[int]) -> Recognised | None:
    """Return the config that builds a module with the same tensors; None if no library has one.

    Whether the module that it builds also computes the same is only known when both are run.

    Args:
        module: The module.
        image_size: (C, H, W) of its inputs.
    """
    if len(image_size) != 3:
        return None
    if isinstance(module, PreTrainedModel):
        return _recognise_transformers(module, image_size)
    if "timm" in type(module).__module__.split(".") or isinstance(getattr(module, "pretrained_cfg", None), dict):
        return _recognise_timm(module, image_size)
    if type(module).__module__.startswith("torchvision.models."):
        return _recognise_torchvision(module, image_size)
    return None


def form_without_labels(module: nn.Module) -> TaskForm | None:
    """Return the task of a module of transformers or timm that is no classifier; None for all others."""
    if isinstance(module, PreTrainedModel):
        form = _form_of(module)
        return None if form is None or form.has_classes else form
    is_encoder = bool(_timm_settings(module)) and getattr(module, "num_classes", None) == 0
    return IMAGE_FEATURE_EXTRACTION if is_encoder else None


def classes_in(module: nn.Module) -> int | None:
    """Return the number of classes in the config of a model of transformers; None for other modules."""
    return module.config.num_labels if isinstance(module, PreTrainedModel) else None


def recognise_wrapper(wrapper: TimmWrapperForImageClassification) -> Recognised:
    """Return the config that builds the module of timm in a model of transformers."""
    labels = {int(index): label for index, label in (wrapper.config.id2label or {}).items()}
    config = IsoPruneConfig(
        base={
            "library": "timm",
            "architecture": wrapper.config.architecture,
            "args": without_classes(wrapper.config.model_args or {}),
        },
        problem_type=wrapper.config.problem_type,
        **label_fields([labels[index] for index in range(len(labels))]),
    )
    return Recognised(config, processor_of(wrapper.timm_model))


def _recognise_transformers(module: PreTrainedModel, image_size: list[int]) -> Recognised | None:
    kind = type(module.config)
    form = _form_of(module)
    if form is None or kind.model_type in ("isoprune", "timm_wrapper"):
        return None
    values = module.config.to_diff_dict() | {"model_type": kind.model_type, "architectures": [type(module).__name__]}
    labels = {int(index): label for index, label in (module.config.id2label or {}).items()}
    names = [labels[index] for index in range(len(labels))]
    described: dict[str, Any] = {"problem_type": module.config.problem_type, **label_fields(names)}
    config = IsoPruneConfig(
        base={"library": "transformers", "config": values, **task_entry(form)},
        image_size=image_size,
        **(described if form.names_classes else {}),
    )
    built = _build(config)
    if built is not None and not _has_tensors_of(built, module):
        record_settings(config, built, module)  # such as a pooler that it does not have
    return Recognised(config) if _builds(config, module) else None


def _form_of(module: PreTrainedModel) -> TaskForm | None:
    """Return the task that the class of a model of transformers is for; None if it is another one."""
    kind = type(module.config)
    for form in TASK_FORMS.values():
        if class_as_made(module) in networks_of(form, kind):
            return form
    return IMAGE_CLASSIFICATION if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else None


def _recognise_timm(module: Any, image_size: list[int]) -> Recognised | None:
    known = _timm_settings(module)
    name = known.get("architecture")
    classes = getattr(module, "num_classes", None)
    if not isinstance(name, str) or not timm.is_model(name) or classes is None:
        return None
    form = IMAGE_CLASSIFICATION if classes else IMAGE_FEATURE_EXTRACTION
    tagged = f"{name}.{known['tag']}" if known.get("tag") else name
    size = image_size[1] if image_size[1] == image_size[2] else image_size[1:]
    for with_channels, with_size in product((False, True), repeat=2):
        args = ({"in_chans": image_size[0]} if with_channels else {}) | ({"img_size": size} if with_size else {})
        config = IsoPruneConfig(
            base={"library": "timm", "architecture": tagged, "args": args, **task_entry(form)},
            image_size=image_size,
            **(label_fields(timm_labels(module)) if classes else {}),
        )
        if _builds(config, module):
            return Recognised(config, _processor_of(known, image_size))
    return None


def processor_of(module: nn.Module) -> BaseImageProcessor | None:
    """Return the image processor of the weights of a module of timm; None for other modules."""
    known = _timm_settings(module)
    if not isinstance(known.get("input_size"), tuple | list):
        return None
    return _processor_of(known, list(known["input_size"]))


def _timm_settings(module: Any) -> dict[str, Any]:
    """Return what a module of timm notes about its architecture and weights; empty for other modules."""
    known = getattr(module, "pretrained_cfg", None)
    return known if isinstance(known, dict) else getattr(known, "to_dict", dict)()


def _processor_of(known: dict[str, Any], image_size: list[int]) -> BaseImageProcessor | None:
    data = resolve_data_config(pretrained_cfg=known)  # type: ignore[no-untyped-call]  # untyped in timm
    if list(data["input_size"]) != image_size:
        return None  # the transform of the weights makes other images
    try:
        return timm_processor(data)
    except UnsupportedArchitectureError:
        return None


def _recognise_torchvision(module: nn.Module, image_size: list[int]) -> Recognised | None:
    for name in _torchvision_names(module):
        classes = _outputs_of(module)
        if classes is None:
            return None
        base: dict[str, Any] = {"library": "torchvision", "architecture": name, "args": {}}
        config = IsoPruneConfig(base=base, image_size=image_size, **label_fields(default_labels(classes)))
        if _builds(config, module):
            return Recognised(config)
        config.base = {**base, "args": args_of_module(config, module)}
        if config.base["args"] and _builds(config, module):
            return Recognised(config)
    return None


def _torchvision_names(module: nn.Module) -> Iterator[str]:
    """Yield the classifiers of torchvision whose builders are in the file of the module's class."""
    for name in torchvision.models.list_models(torchvision.models):
        if torchvision.models.get_model_builder(name).__module__ == type(module).__module__:
            yield name


def _outputs_of(module: nn.Module) -> int | None:
    """Return the number of outputs of the last layer that has one."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    last = layers[-1] if layers else None
    return getattr(last, "out_features", getattr(last, "out_channels", None))


def _builds(config: IsoPruneConfig, module: nn.Module) -> bool:
    """Return whether a config builds a module with the same tensors."""
    built = _build(config)
    return built is not None and _has_tensors_of(built, module)


def _build(config: IsoPruneConfig) -> nn.Module | None:
    """Return the module that a config builds, on the meta device; None if it builds none."""
    try:
        with torch.device("meta"):
            return build_base(copy.deepcopy(config))
    except CheckpointError:
        return None


def _has_tensors_of(built: nn.Module, module: nn.Module) -> bool:
    shapes = ({name: tensor.shape for name, tensor in part.state_dict().items()} for part in (built, module))
    return next(shapes) == next(shapes)
