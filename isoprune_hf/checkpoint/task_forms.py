# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""The tasks of a network and how a folder of each opens (part of the shipped file): `TASK_FORMS` and `task_of`."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import transformers
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_DEPTH_ESTIMATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from isoprune_hf.errors import CheckpointError

_ENCODERS = ("Model", "ModelWithProjection")  # ends of the names of classes that hold an encoder of images alone


class TaskForm(NamedTuple):
    """How a folder of a task opens.

    Args:
        task: Name of the task.
        pipeline: Name of its pipeline in transformers.
        auto_class: Auto class of transformers that opens it.
        model_class: The class of this file that it opens as.
        networks: Config class of transformers -> the class, or classes, that the network is of.
        libraries: The libraries whose networks it takes.
        has_classes: The network returns one vector of logits of classes for an image.
        names_classes: The config names the classes of its logits, which may be those of pixels or of boxes.
        outputs: The names of the outputs that stay as they are; all of them if none are named.
        reads_texts: The network also takes texts, and runs on images alone as `take_images` makes it.
    """

    task: str
    pipeline: str
    auto_class: str
    model_class: str
    networks: Mapping[type, Any]
    libraries: tuple[str, ...]
    has_classes: bool
    names_classes: bool
    outputs: tuple[str, ...] = ()
    reads_texts: bool = False


IMAGE_CLASSIFICATION = TaskForm(
    task="image-classification",
    pipeline="image-classification",
    auto_class="AutoModelForImageClassification",
    model_class="IsoPruneForImageClassification",
    networks=MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    libraries=("timm", "torchvision", "transformers", "python"),
    has_classes=True,
    names_classes=True,
)
IMAGE_FEATURE_EXTRACTION = TaskForm(
    task="image-feature-extraction",
    pipeline="image-feature-extraction",
    auto_class="AutoModel",
    model_class="IsoPruneModel",
    networks=MODEL_MAPPING,
    libraries=("timm", "transformers"),
    has_classes=False,
    names_classes=False,
)
SEMANTIC_SEGMENTATION = TaskForm(
    task="semantic-segmentation",
    pipeline="image-segmentation",
    auto_class="AutoModelForSemanticSegmentation",
    model_class="IsoPruneForSemanticSegmentation",
    networks=MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    libraries=("transformers",),
    has_classes=False,
    names_classes=True,
)
DEPTH_ESTIMATION = TaskForm(
    task="depth-estimation",
    pipeline="depth-estimation",
    auto_class="AutoModelForDepthEstimation",
    model_class="IsoPruneForDepthEstimation",
    networks=MODEL_FOR_DEPTH_ESTIMATION_MAPPING,
    libraries=("transformers",),
    has_classes=False,
    names_classes=False,
)
OBJECT_DETECTION = TaskForm(
    task="object-detection",
    pipeline="object-detection",
    auto_class="AutoModelForObjectDetection",
    model_class="IsoPruneForObjectDetection",
    networks=MODEL_FOR_OBJECT_DETECTION_MAPPING,
    libraries=("transformers",),
    has_classes=False,
    names_classes=True,
    outputs=("logits", "pred_boxes"),
)
ZERO_SHOT_IMAGE_CLASSIFICATION = TaskForm(
    task="zero-shot-image-classification",
    pipeline="zero-shot-image-classification",
    auto_class="AutoModelForZeroShotImageClassification",
    model_class="IsoPruneForZeroShotImageClassification",
    networks=MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    libraries=("transformers",),
    has_classes=False,
    names_classes=False,
    reads_texts=True,
)
TASK_FORMS = {
    form.task: form
    for form in (
        IMAGE_CLASSIFICATION,
        IMAGE_FEATURE_EXTRACTION,
        SEMANTIC_SEGMENTATION,
        DEPTH_ESTIMATION,
        OBJECT_DETECTION,
        ZERO_SHOT_IMAGE_CLASSIFICATION,
    )
}


def task_of(base: Mapping[str, Any] | None) -> TaskForm:
    """Return the task of the entry `base` of a config, which names it as `task` unless it is image classification.

    Raises:
        CheckpointError: This code does not know the task.
    """
    name = (base or {}).get("task", IMAGE_CLASSIFICATION.task)
    if not isinstance(name, str) or name not in TASK_FORMS:
        raise CheckpointError(f"config.base.task: {name!r:.99} is not supported; use {', '.join(TASK_FORMS)}")
    return TASK_FORMS[name]


def networks_of(form: TaskForm, config_class: type) -> tuple[Any, ...]:
    """Return the classes of transformers that a network of a task with this config is of; none if there are none."""
    found = form.networks.get(config_class, ())
    first = tuple(kind for kind in (found if isinstance(found, tuple) else (found,)) if kind is not None)
    if form.reads_texts:
        return tuple(filter(_embeds_images, first))
    if form is not IMAGE_FEATURE_EXTRACTION:
        return first
    return tuple(filter(_takes_images, (*first, *_other_encoders(config_class, first))))


def _other_encoders(config_class: type, known: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the encoders of a config that no Auto class, or that of backbones alone, opens: a tower of CLIP, ..."""
    stem = config_class.__name__.removesuffix("Config")
    named = (getattr(transformers, f"{stem}{end}", None) for end in _ENCODERS)
    found: tuple[Any, ...] = (*named, MODEL_FOR_BACKBONE_MAPPING.get(config_class, None))
    return tuple(kind for kind in found if kind not in (None, *known) and kind.config_class is config_class)


def _embeds_images(kind: Any) -> bool:
    """Return whether a class of two towers has a pass of its own for images, which gives one embedding for each."""
    return hasattr(kind, "get_image_features") and "pixel_values" in inspect.signature(kind.forward).parameters


def _takes_images(kind: Any) -> bool:
    """Return whether a class is a network of transformers that takes images first, and not texts."""
    return getattr(kind, "main_input_name", None) == "pixel_values"


def task_entry(form: TaskForm) -> dict[str, str]:
    """Return the entry of `base` of a config for a task, see `task_of`."""
    return {} if form is IMAGE_CLASSIFICATION else {"task": form.task}
