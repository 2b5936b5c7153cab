"""Check that the classes of a data set are the classes of a model: `check_labels` and `check_problem`."""

import re
from collections.abc import Sequence

from timm.data.imagenet_info import ImageNetInfo
from transformers import PreTrainedConfig

from isoprune_hf.errors import DatasetError

_WORDNET_ID = re.compile(r"n\d{8}")
_MAX_DIFFERING_SHARE = 0.1  # of the class names; spellings differ between sources


def check_problem(config: PreTrainedConfig) -> None:
    """Check that a model chooses one of several classes, as images with one label each need.

    Raises:
        DatasetError: It has another problem type. As in transformers, one output without a type is a regression.
    """
    kind = config.problem_type or ("regression" if config.num_labels == 1 else None)
    if kind not in (None, "single_label_classification"):
        raise DatasetError(
            f"data: each image has one class, and config.problem_type of the model is {kind}; pass batches with their "
            "targets to isoprune_hf.prune and finetune, or set `--prune.num_labels data` (in finetune and evaluate: "
            "`--num_labels data`) for a new head"
        )


def check_labels(label_names: Sequence[str], id2label: dict[int, str]) -> None:
    """Check that index i means the same class in the data and in the model.

    Generic names of the model ("LABEL_3", "3") fit any data, and data whose classes are only numbers fit any model.
    Names are compared in lower case up to the first comma. WordNet ids in the data are translated to ImageNet words
    if the model uses words.

    Raises:
        DatasetError: The number of classes or their order differs.
    """
    if len(label_names) != len(id2label):
        raise DatasetError(
            f"the data has {len(label_names)} classes, the model has {len(id2label)}; "
            "set `--prune.num_labels data` (in finetune and evaluate: `--num_labels data`) for a new head"
        )
    model_names = [id2label[index] for index in range(len(id2label))]
    if all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(model_names)):
        return
    data_names = list(label_names)
    if data_names == [str(index) for index in range(len(data_names))]:
        return  # plain numbers say nothing about the meaning of a class
    if all(map(_WORDNET_ID.fullmatch, data_names)) and not any(map(_WORDNET_ID.fullmatch, model_names)):
        data_names = _translate(data_names)
    data_keys = [_normalise(name) for name in data_names]
    model_keys = [_normalise(name) for name in model_names]
    differing = [index for index, key in enumerate(data_keys) if key != model_keys[index]]
    is_reordered = any(data_keys[index] in model_keys for index in differing)
    if is_reordered or len(differing) > _MAX_DIFFERING_SHARE * len(model_names):
        examples = "; ".join(f"index {i}: data {data_names[i]!r}, model {model_names[i]!r}" for i in differing[:3])
        raise DatasetError(
            f"the classes of the data and of the model differ at {len(differing)} of {len(model_names)} places: "
            f"{examples}; reorder the classes of the data, or set `--prune.num_labels data` (in finetune "
            "and evaluate: `--num_labels data`) for a new head"
        )


def _translate(wordnet_ids: list[str]) -> list[str]:
    words = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    return [words.get(name, name) if isinstance(words, dict) else name for name in wordnet_ids]


def _normalise(name: str) -> str:
    return name.split(",")[0].replace("_", " ").strip().lower()
