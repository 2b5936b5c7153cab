"""Open the dense base that a pruned model was cut from (`open_source`), and the teacher of a training."""

from collections.abc import Sequence
from pathlib import Path

from accelerate.logging import get_logger

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import is_cut, meta_copy
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.checkpoint.transfer import find_class_dims
from isoprune_hf.commands.steps.holding_out import has_seen, may_have_seen
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.labels import (
    adopt_problem,
    align_labels,
    check_labels,
    check_named,
    check_problem,
    classes_of,
)
from isoprune_hf.errors import CheckpointError, DatasetError, IsoPruneError, RecipeError
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.models.head import replace_head
from isoprune_hf.models.held import output_shapes
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.recipes.values import MULTI_LABEL, ProblemType
from isoprune_hf.tasks.registry import find_task
from isoprune_hf.training.label_free import check_unlabelled

logger = get_logger(__name__)


def open_teacher(
    student: IsoPruneForImageClassification, finetune: FinetuneRecipe, base: BaseModel | None = None
) -> BaseModel | None:
    """Open the model that teaches; None if there is none.

    Args:
        student: The model to train.
        finetune: Names the teacher.
        base: The dense base, if it is open already; if not, `teacher: auto` reopens it.

    Raises:
        RecipeError: The teacher cannot be opened; with `auto`, that is the dense base, if it was trained.
        DatasetError: Its classes are not those of the student.
    """
    if finetune.distillation == "none" or finetune.teacher == "none":
        return None
    if finetune.teacher == "auto":
        if _is_untrained(student.config):
            logger.info("no teacher: the dense base has untrained weights")
            return None
        return _of_equal_classes(student, base or _reopen_teacher(student))
    teacher = load_base(finetune.teacher, tasks=(task_of(student.config.base).task,))
    if find_task(student.config).reads_labels:
        names = class_names(student)
        check_classes([names[index] for index in sorted(names)], teacher.model, like=student)
    else:
        _check_shapes(student, teacher.model)
    return teacher


def check_taught(model: IsoPruneForImageClassification, finetune: FinetuneRecipe) -> None:
    """Check before any work that a network without labels will have a teacher.

    Args:
        model: The dense base, or the model to train.
        finetune: Names the teacher.

    Raises:
        RecipeError: It will have none, or a setting is for classes.
    """
    if finetune.epochs and not find_task(model.config).reads_labels:
        has_teacher = finetune.teacher != "auto" or not _is_untrained(model.config)
        check_unlabelled(finetune, has_teacher=has_teacher)


def _check_shapes(student: IsoPruneForImageClassification, teacher: IsoPruneForImageClassification) -> None:
    """Check that a teacher has the outputs of a student without labels.

    Raises:
        RecipeError: It has others.
    """
    first, second = (output_shapes(model) for model in (student, teacher))
    if first != second:
        raise RecipeError(
            f"finetune.teacher: the outputs of the teacher have the shapes {second}, those of the student {first}; "
            "choose a teacher with the same outputs, such as the dense base (auto)"
        )


def _is_untrained(config: IsoPruneConfig) -> bool:
    """Return whether the dense base of a model has untrained weights, or is the model itself."""
    source = config.source or {}
    if not source.get("name"):
        return not is_cut(config)
    return not source.get("changed") and bool(not source.get("pretrained") or source.get("num_labels"))


def _reopen_teacher(student: IsoPruneForImageClassification) -> BaseModel:
    """Open the dense base of a student as its teacher.

    Raises:
        RecipeError: It cannot be opened, or has changed since the cut.
    """
    advice = "name its folder with --finetune.teacher, or train without a teacher with --finetune.teacher none"
    if (student.config.source or {}).get("changed"):
        raise RecipeError(
            "finetune.teacher auto: the dense base was trained after it was opened, and its place is not known; "
            f"{advice}"
        )
    try:
        return open_source(student)
    except IsoPruneError as error:
        raise RecipeError(f"finetune.teacher auto: the dense base cannot be opened: {error}; {advice}") from error


def reopen_base(model: IsoPruneForImageClassification) -> BaseModel | None:
    """Open the dense base that a folder was cut from; None, with a warning, if it cannot be opened."""
    if not (model.config.source or {}).get("name"):
        return None
    try:
        return _of_equal_classes(model, open_source(model))
    except IsoPruneError as error:
        logger.warning(f"the dense base is neither evaluated nor used as a teacher: {error}")
        return None


def _of_equal_classes(model: IsoPruneForImageClassification, base: BaseModel) -> BaseModel | None:
    """Return the dense base, or None, with a line, if it has other classes than a model whose head was replaced."""
    if not find_task(model.config).reads_labels:
        return base
    names = class_names(model)
    try:
        check_classes([names[index] for index in sorted(names)], base.model, like=model)
    except DatasetError:
        logger.info(
            "the dense base is neither evaluated nor used as a teacher: it has other classes than the new head"
        )
        return None
    return base


def open_with_new_head(name: str, labels: tuple[str, ...], seed: int, problem: ProblemType | None = None) -> BaseModel:
    """Open a pruned model with a new head for other classes; its costs are those with this head.

    Args:
        name: Folder or Hub id.
        labels: Names of the classes.
        seed: Seed of the weights of the head.
        problem: Problem type of the head.
    """
    found = load_base(name)
    untrained = find_class_dims(found.model.config)
    headed = replace_head(found, labels, seed=seed, untrained=untrained, problem=problem)
    model = headed.model
    if model.config.cost is not None:
        dense, pruned = count_cost(meta_copy(model, dense=True)), count_cost(model)
        model.config.cost = {"base": dense.to_dict(), "pruned": pruned.to_dict()}
    return headed


def open_source(model: IsoPruneForImageClassification, name: str | None = None) -> BaseModel:
    """Open the dense base that a model was cut from.

    Args:
        model: The pruned model.
        name: Current place of the base, if it has moved since the cut.

    Raises:
        RecipeError: The model's config names no base, or the base cannot be opened.
        CheckpointError: The base has changed since the cut.
    """
    source = model.config.source or {}
    place = name or source.get("name")
    if not place:
        raise RecipeError("config.source does not name the base that the model was cut from")
    is_saved = bool(name) and Path(place).is_dir()  # not rebuilt from an architecture
    names, num_labels = class_names(model), source.get("num_labels")
    base = load_base(
        place,
        is_saved or source.get("pretrained", True),
        model_args=None if is_saved else source.get("model_args"),
        num_labels=num_labels,
        label_names=tuple(names[index] for index in sorted(names)) if num_labels else None,
        problem_type=model.config.problem_type,
        seed=source.get("seed", 0),
        weights=None if is_saved else source.get("weights"),
        revision=None if is_saved else source.get("revision"),
        tasks=(task_of(model.config.base).task,),
    )
    if source.get("fingerprint") not in (None, fingerprint(base.model.model)):
        raise CheckpointError(f"the base {place} has other weights than the one that was cut")
    base.model.config.image_size = model.config.image_size  # that of data.image_size
    return base


def check_classes(
    label_names: Sequence[str], model: IsoPruneForImageClassification, *, like: IsoPruneForImageClassification
) -> None:
    """Check that a model answers as another one does, see `check_labels`; without a problem type it takes that one's.

    Args:
        label_names: Names of the classes of the other model by index.
        model: The model; its config may change in place.
        like: The other model.

    Raises:
        DatasetError: It has other classes or another problem type.
    """
    is_multi_label = like.config.problem_type == MULTI_LABEL
    check_labels(label_names, class_names(model))
    check_problem(model.config, is_multi_label=is_multi_label)
    if is_multi_label:
        model.config.problem_type = MULTI_LABEL


def align_images(images: ImageData, model: IsoPruneForImageClassification) -> ImageData:
    """Return images with the labels of a model that answers as they are labelled, see `align_labels`.

    For a task that reads no labels they stay as they are. A model without a problem type takes that of the images, in
    place. A warning says if the model has seen images for evaluation, or may have.

    Raises:
        DatasetError: It has other classes or another problem type, or does not use the column that was named.
    """
    aligned = images
    task = find_task(model.config)
    check_named(images, task.annotations, task.form.task)
    if task.reads_labels:
        aligned = align_labels(images, class_names(model))
        check_problem(model.config, is_multi_label=images.is_multi_label)
        adopt_problem(model.config, is_multi_label=images.is_multi_label)
    if has_seen(model.config, images):
        logger.warning(
            f"data: the model was pruned or trained on images of {images.name} that it is evaluated on, with another "
            "data.holdout, so its figures are too good"
        )
    elif may_have_seen(model.config, images):
        logger.warning(
            f"data: the folder of the model does not record which images of {images.name} were held out when it was "
            "pruned or trained, as folders of earlier versions; it may have seen those that it is evaluated on now: "
            "prune again for figures that hold"
        )
    return aligned


def class_names(model: IsoPruneForImageClassification) -> dict[int, str]:
    """Return the names of the classes by index."""
    return classes_of(model.config)
