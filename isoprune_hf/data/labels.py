"""Prove that label i is the same class in the data and in a model: `align_labels`, `check_labels`, `check_problem`."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
from datasets import ClassLabel, Dataset
from timm.data.imagenet_info import ImageNetInfo
from transformers import PreTrainedConfig

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.data.class_names import renumber_split, shorten
from isoprune_hf.data.columns import Annotation
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.label_columns import label_kind
from isoprune_hf.data.unlabelled import UNLABELLED
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes.values import MULTI_LABEL, ONE_CLASS

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

_WORDNET_ID = re.compile(r"n\d{8}")
_MAX_DIFFERING_SHARE = 0.1  # of the class names; spellings differ between sources
IMAGE_CLASSES: tuple[Annotation, ...] = ("classes",)  # those that classifiers use
_NEW_HEAD = "set `--prune.num_labels data` (in finetune and evaluate: `--num_labels data`) for a new head"


def check_problem(config: PreTrainedConfig, *, is_multi_label: bool) -> None:
    """Check that a model answers as the labels of images are: by one of several classes, or by any number of them.

    A model without a problem type fits both; as in transformers, the labels decide then.

    Args:
        config: Config of the model.
        is_multi_label: Each image has a list of classes.

    Raises:
        DatasetError: It has another problem type. As in transformers, one output without a type is a regression,
            unless there are lists of classes.
    """
    if is_multi_label:
        if config.problem_type not in (None, MULTI_LABEL):
            raise DatasetError(
                f"data: each image has a list of classes, and config.problem_type of the model is "
                f"{config.problem_type}; choose a model of {MULTI_LABEL}, or {_NEW_HEAD}"
            )
        return
    kind = config.problem_type or ("regression" if config.num_labels == 1 else None)
    if kind not in (None, ONE_CLASS):
        raise DatasetError(
            f"data: each image has one class, and config.problem_type of the model is {kind}; pass batches with their "
            "targets to isoprune_hf.prune and finetune, or set `--prune.num_labels data` (in finetune and evaluate: "
            "`--num_labels data`) for a new head"
        )


def check_named(images: ImageData, used: Sequence[Annotation], task: str) -> None:
    """Check that a task uses the column that `data.label_column` names, if it names one.

    Args:
        images: The images.
        used: Annotations that the task uses.
        task: Its name.

    Raises:
        DatasetError: It uses others, or none.
    """
    if images.named is None or images.named.holds in used:
        return
    reads, advice = (" or ".join(used), f"name a column of {' or '.join(used)}") if used else ("no annotations", "")
    raise DatasetError(
        f"data.label_column: the column {images.named.name!r} of {images.name!r} has {images.named.holds}, and {task} "
        f"reads {reads}; {advice}{', or ' * bool(advice)}leave the setting out"
    )


def require_labels(images: ImageData) -> None:
    """Check that images have labels, as a classifier needs.

    Raises:
        DatasetError: They have none.
    """
    check_named(images, IMAGE_CLASSES, task_forms.IMAGE_CLASSIFICATION.task)
    if images.label_names == (UNLABELLED,):
        raise DatasetError(
            f"data: the images of {images.name} have no labels, which an image classifier needs: put them into "
            "folders of classes, or name the column of the classes with --data.label_column"
        )


def adopt_problem(config: PreTrainedConfig, *, is_multi_label: bool) -> None:
    """Set the problem type of lists of classes in a config that names none, in place, with a line in the log."""
    if is_multi_label and config.problem_type is None:
        logger.warning(
            "data: each image has a list of classes, and the model has no problem type, so it is one of "
            f"{MULTI_LABEL}: each class has a probability of its own"
        )
        config.problem_type = MULTI_LABEL


def classes_of(config: PreTrainedConfig) -> dict[int, str]:
    """Return the names of the classes of a model by index."""
    return {int(index): name for index, name in (config.id2label or {}).items()}


def align_split(split: Rows, config: PreTrainedConfig) -> Rows:
    """Return one split with the labels of a model, see `align_labels`.

    It is returned as it is where its classes have no names, or the config does not describe the network.

    Raises:
        DatasetError: Nothing proves which class of the model a class of the data is.
    """
    feature = label_kind(split.features.get("label")) if isinstance(split, Dataset) else None
    if not isinstance(feature, ClassLabel) or is_own_network(config):
        return split
    classes = classes_of(config)
    places = match_labels(feature.names, classes)
    if places == list(range(len(classes))):
        return split
    aligned: Rows = renumber_split(split, [classes[index] for index in range(len(classes))], np.array(places))
    return aligned


def is_own_network(config: PreTrainedConfig) -> bool:
    """Return whether a config says nothing about its network, not even the classes."""
    return isinstance(config, IsoPruneConfig) and config.base is None


def align_labels(images: ImageData, id2label: dict[int, str]) -> ImageData:
    """Return images whose label i is class i of a model: labels of another order, or of a part of them, change.

    One line is logged where labels change, and where only their number shows that they fit.

    Raises:
        DatasetError: Nothing proves which class of the model a class of the data is.
    """
    require_labels(images)
    names = images.label_names
    places = match_labels(names, id2label, is_sorted=images.is_order_ambiguous)
    model_names = tuple(id2label[index] for index in range(len(id2label)))
    if places == list(range(len(model_names))):
        if model_names != tuple(names) and (_are_generic(id2label) or _are_numbers(names)):
            logger.info(
                f"data: the model does not name its classes; class i of the data ({shorten(names)}) is output i"
            )
        return images
    part = "all" if len(names) == len(model_names) else f"{len(names)} of {len(model_names)}"
    logger.warning(f"data: the labels are numbered as in the model, by the names of the classes: {part} occur")
    table = np.array(places)
    return replace(
        images,
        train=None if images.train is None else renumber_split(images.train, model_names, table),
        evaluation=None if images.evaluation is None else renumber_split(images.evaluation, model_names, table),
        label_names=model_names,
        is_order_ambiguous=False,
    )


def check_labels(label_names: Sequence[str], id2label: dict[int, str]) -> None:
    """Check that index i means the same class in two models; see `match_labels`.

    Raises:
        DatasetError: The number of classes or their order differs.
    """
    places = match_labels(label_names, id2label)
    if places != list(range(len(id2label))):
        _refuse_different(list(label_names), [id2label[index] for index in range(len(id2label))])


def match_labels(label_names: Sequence[str], id2label: dict[int, str], *, is_sorted: bool = False) -> list[int]:
    """Return the class of the model for each class of the data.

    Classes are matched by name: in lower case, as a whole or up to the first comma, and WordNet ids as the words of
    ImageNet. Where all names stand at the same places except for a few spellings, the places decide. Without names on
    one side ("LABEL_3", "3") the numbers decide, if there are equally many classes.

    Args:
        label_names: Names of the classes of the data.
        id2label: Names of the classes of the model.
        is_sorted: The data has an order only from sorting its names, and other libraries sort them otherwise; its
            numbers prove nothing.

    Raises:
        DatasetError: A class of the data is none of the model, or nothing proves which.
    """
    model_names = [id2label[index] for index in range(len(id2label))]
    data_names = list(label_names)
    by_name = _match_names(data_names, model_names)
    if by_name is not None:
        return by_name
    if len(data_names) != len(model_names):
        raise DatasetError(
            f"the data has {len(data_names)} classes ({shorten(data_names)}), the model has {len(model_names)} "
            f"({shorten(model_names)}); {_NEW_HEAD}"
        )
    if not _are_generic(id2label) and not _are_numbers(data_names):
        _refuse_different(data_names, model_names)
    if is_sorted:
        raise DatasetError(
            f"the model does not name its classes ({shorten(model_names)}), and the folders of the data can be sorted "
            f"as {shorten(data_names)} or as {shorten(sorted(data_names))}; write the classes in the order of the "
            f"model into classes.txt in the folder of the data, one per line, or {_NEW_HEAD}"
        )
    return list(range(len(model_names)))


def place_names(label_names: Sequence[str], model_names: Sequence[str], *, is_numbered: bool) -> list[int] | None:
    """Return the class of the model for each name by the rules of `match_labels`; None if a name is none of them.

    Args:
        label_names: Names of classes.
        model_names: Names of the classes of the model by index.
        is_numbered: The names are in the order of the model where one side has none and their numbers are equal.
    """
    by_name = _match_names(list(label_names), list(model_names))
    if by_name is not None or not is_numbered or len(label_names) != len(model_names):
        return by_name
    has_none = _are_generic(dict(enumerate(model_names))) or _are_numbers(label_names)
    return list(range(len(model_names))) if has_none else None


def _match_names(data_names: list[str], model_names: list[str]) -> list[int] | None:
    """Return the place in the model of each name of the data; None if the names do not show it."""
    data_names, model_names = _spelled_alike(data_names, model_names)
    data_keys, model_keys = [*map(_first_name, data_names)], [*map(_first_name, model_names)]
    if len(data_names) == len(model_names):
        differing = [index for index, key in enumerate(data_keys) if key != model_keys[index]]
        is_reordered = any(data_keys[index] in model_keys for index in differing)
        if not is_reordered and len(differing) <= _MAX_DIFFERING_SHARE * len(model_names):
            return list(range(len(model_names)))
    for data, model in (([*map(_whole_name, data_names)], [*map(_whole_name, model_names)]), (data_keys, model_keys)):
        places = {name: index for index, name in enumerate(model) if model.count(name) == 1}
        if len(set(data)) == len(data) and all(name in places for name in data):
            return [places[name] for name in data]
    return None


def _spelled_alike(data_names: list[str], model_names: list[str]) -> tuple[list[str], list[str]]:
    """Return both lists in WordNet ids or in words, where one has ids and the other one has words."""
    are_ids = [all(map(_WORDNET_ID.fullmatch, names)) for names in (data_names, model_names)]
    if are_ids == [False, True]:
        return data_names, _translate(model_names)
    if are_ids != [True, False]:
        return data_names, model_names
    info = ImageNetInfo("imagenet-1k")
    ids, words = info.label_names(), info.label_descriptions()  # type: ignore[no-untyped-call]  # timm
    # Two classes of ImageNet are called crane: only their places tell them apart.
    if len(words) == len(model_names) and [*map(_first_name, words)] == [*map(_first_name, model_names)]:
        return data_names, list(ids)
    return _translate(data_names), model_names


def _refuse_different(data_names: list[str], model_names: list[str]) -> NoReturn:
    """Raise for classes that no rule matches."""
    pairs = zip(*_spelled_alike(data_names, model_names), strict=False)
    differing = [index for index, (data, model) in enumerate(pairs) if _first_name(data) != _first_name(model)]
    examples = "; ".join(f"index {i}: data {data_names[i]!r}, model {model_names[i]!r}" for i in differing[:3])
    raise DatasetError(
        f"the classes of the data and of the model differ at {len(differing)} of {len(model_names)} places: "
        f"{examples}; rename the classes of the data, or {_NEW_HEAD}"
    )


def _are_generic(id2label: dict[int, str]) -> bool:
    return all(name in (f"LABEL_{index}", str(index)) for index, name in id2label.items())


def _are_numbers(names: Sequence[str]) -> bool:
    """Return whether names are only the numbers of the classes, which say nothing about their meaning."""
    return list(names) == [str(index) for index in range(len(names))]


def _translate(wordnet_ids: list[str]) -> list[str]:
    words = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    return [words.get(name, name) if isinstance(words, dict) else name for name in wordnet_ids]


def _whole_name(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def _first_name(name: str) -> str:
    return _whole_name(name.split(",")[0])
