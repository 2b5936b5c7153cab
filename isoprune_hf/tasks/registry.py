"""The tasks by the name of their pipeline, `TASKS`, and the task of a config: `find_task`."""

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.recipes.values import MULTI_LABEL
from isoprune_hf.tasks.image_classification import IMAGE_CLASSIFICATION
from isoprune_hf.tasks.image_feature_extraction import IMAGE_FEATURE_EXTRACTION
from isoprune_hf.tasks.multi_label_classification import MULTI_LABEL_CLASSIFICATION
from isoprune_hf.tasks.task import Task

TASKS: dict[str, Task] = {task.form.task: task for task in (IMAGE_CLASSIFICATION, IMAGE_FEATURE_EXTRACTION)}


def find_task(config: IsoPruneConfig) -> Task:
    """Return the task that a config names, by its problem type if it is a classifier.

    Raises:
        CheckpointError: There is no such task.
    """
    task = TASKS[task_of(config.base).task]
    is_multi_label = task is IMAGE_CLASSIFICATION and config.problem_type == MULTI_LABEL
    return MULTI_LABEL_CLASSIFICATION if is_multi_label else task
