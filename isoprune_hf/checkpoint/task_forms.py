# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""The tasks of a network and how a folder of each opens (part of the shipped file): `TASK_FORMS` and `task_of`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from isoprune_hf.errors import CheckpointError


class TaskForm(NamedTuple):
    """How a folder of a task opens.

    Args:
        task: Name of the task, which is that of its pipeline in transformers.
        auto_class: Auto class of transformers that opens it.
        model_class: The class of this file that it opens as.
        networks: Config class of transformers -> the class, or classes, that the network is of.
        has_classes: The network returns logits of the classes that the config names.
    """

    task: str
    auto_class: str
    model_class: str
    networks: Mapping[type, Any]
    has_classes: bool


IMAGE_CLASSIFICATION = TaskForm(
    task="image-classification",
    auto_class="AutoModelForImageClassification",
    model_class="IsoPruneForImageClassification",
    networks=MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    has_classes=True,
)
IMAGE_FEATURE_EXTRACTION = TaskForm(
    task="image-feature-extraction",
    auto_class="AutoModel",
    model_class="IsoPruneModel",
    networks=MODEL_MAPPING,
    has_classes=False,
)
TASK_FORMS = {form.task: form for form in (IMAGE_CLASSIFICATION, IMAGE_FEATURE_EXTRACTION)}


def task_of(base: Mapping[str, Any] | None) -> TaskForm:
    """Return the task of the entry `base` of a config, which names it as `task` unless it is image classification.

    Raises:
        CheckpointError: This code does not know the task.
    """
    name = (base or {}).get("task", IMAGE_CLASSIFICATION.task)
    if not isinstance(name, str) or name not in TASK_FORMS:
        raise CheckpointError(f"config.base.task: {name!r:.99} is not supported; use {', '.join(TASK_FORMS)}")
    return TASK_FORMS[name]


def task_entry(form: TaskForm) -> dict[str, str]:
    """Return the entry of `base` of a config for a task, see `task_of`."""
    return {} if form is IMAGE_CLASSIFICATION else {"task": form.task}
