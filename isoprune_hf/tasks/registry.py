"""The tasks by the name of their pipeline, `TASKS`, and the task of a config: `find_task`, `task_named`."""

from collections.abc import Mapping
from typing import Any

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.recipes.values import MULTI_LABEL
from isoprune_hf.tasks.depth_estimation import DEPTH_ESTIMATION
from isoprune_hf.tasks.image_classification import IMAGE_CLASSIFICATION
from isoprune_hf.tasks.image_feature_extraction import IMAGE_FEATURE_EXTRACTION
from isoprune_hf.tasks.multi_label_classification import MULTI_LABEL_CLASSIFICATION
from isoprune_hf.tasks.object_detection import OBJECT_DETECTION
from isoprune_hf.tasks.semantic_segmentation import SEMANTIC_SEGMENTATION
from isoprune_hf.tasks.task import Task
from isoprune_hf.tasks.zero_shot_image_classification import ZERO_SHOT_IMAGE_CLASSIFICATION

TASKS: dict[str, Task] = {
    task.form.task: task
    for task in (
        IMAGE_CLASSIFICATION,
        IMAGE_FEATURE_EXTRACTION,
        SEMANTIC_SEGMENTATION,
        DEPTH_ESTIMATION,
        OBJECT_DETECTION,
        ZERO_SHOT_IMAGE_CLASSIFICATION,
    )
}


def find_task(config: IsoPruneConfig) -> Task:
    """Return the task of a config, see `task_named`."""
    return task_named(config.base, config.problem_type)


def task_named(base: Mapping[str, Any] | None, problem_type: str | None) -> Task:
    """Return the task that the entry `base` of a config names, by the problem type if it is a classifier.

    Raises:
        CheckpointError: There is no such task.
    """
    task = TASKS[task_of(base).task]
    is_multi_label = task is IMAGE_CLASSIFICATION and problem_type == MULTI_LABEL
    return MULTI_LABEL_CLASSIFICATION if is_multi_label else task
