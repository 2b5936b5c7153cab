"""Whether the labels of data are those of a model."""

import re
from collections.abc import Sequence

from timm.data import ImageNetInfo

from isoprune_hf.errors import DatasetError

_SYNSET = re.compile(r"n\d{8}")


def check_labels(label_names: Sequence[str], id2label: dict[int, str]) -> None:
    """Check that index i means the same class in the data and in the model.

    Generic names of the model ("LABEL_3", "3") fit anything, and so do data whose labels are numbers alone. Names are
    compared in lower case up to the first comma; WordNet ids of the data are read as their ImageNet words where the
    model speaks words.

    Raises:
        DatasetError: The number of classes or their order differs.
    """
    if len(label_names) != len(id2label):
        raise DatasetError(
            f"the data has {len(label_names)} classes, the model has {len(id2label)}; "
            "give `--prune.num_labels data` for a new head"
        )
    model_names = [id2label[index] for index in range(len(id2label))]
    if all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(model_names)):
        return
    data_names = list(label_names)
    if data_names == [
        str(index) for index in range(len(data_names))
    ]:  # numbers alone, which have no order of their own
        return
    if all(map(_SYNSET.fullmatch, data_names)) and not any(map(_SYNSET.fullmatch, model_names)):
        words = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
        data_names = [words.get(name, name) for name in data_names]
    data_keys, model_keys = map(_normalise, data_names), [_normalise(name) for name in model_names]
    differing, crossed = [], False
    for index, key in enumerate(data_keys):
        if key != model_keys[index]:
            differing.append(index)
            crossed = crossed or key in model_keys
    if crossed or len(differing) > 0.1 * len(model_names):
        examples = "; ".join(f"index {i}: data {data_names[i]!r}, model {model_names[i]!r}" for i in differing[:3])
        raise DatasetError(
            f"the classes of the data are not those of the model at {len(differing)} of {len(model_names)} places: "
            f"{examples}; bring the data into the model's order, or give `--prune.num_labels data` for a new head"
        )


def _normalise(name: str) -> str:
    return name.split(",")[0].replace("_", " ").strip().lower()
