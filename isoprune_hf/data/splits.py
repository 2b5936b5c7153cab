"""Find the splits of a recipe among those of a data set: `choose_splits`, and `take_part` for slices of them."""

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, IterableDataset, ReadInstruction

from isoprune_hf.data.label_columns import Split, read_strata
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

UNDIVIDED = "all"  # name of the only split of files that name none
_TRAIN = ("train", "training")
_VALIDATION = ("validation", "valid", "val")
_EVALUATION = (*_VALIDATION, "dev", "test", "testing")


@dataclass(frozen=True)
class ChosenSplits:
    """Names of the splits of a data set that a recipe means.

    Args:
        train: For training; None if there is none.
        evaluation: For evaluation; None if there is none.
        is_undivided: The data set has one split without a name of a split, and that is the one for training.
        is_held_out: Images of the split for training are held out, as there is none for evaluation.
    """

    train: str | None
    evaluation: str | None
    is_undivided: bool = False
    is_held_out: bool = False


def choose_splits(available: Sequence[str], recipe: DataRecipe) -> ChosenSplits:
    """Find the splits of a recipe by their names in any case; the default ones also by other usual names.

    Raises:
        DatasetError: The data set has neither split.
    """
    is_undivided = len(available) == 1 and available[0].casefold() not in (*_TRAIN, *_EVALUATION)
    names = [_name_of(recipe.train_split), _name_of(recipe.eval_split)]
    aliases = dict.fromkeys(_TRAIN, available[0]) if is_undivided else {}
    train = _find(names[0], available, _TRAIN) or aliases.get(names[0])
    usual = _EVALUATION if names[1] == DataRecipe.eval_split else _VALIDATION
    evaluation = _find(names[1], available, usual) or aliases.get(names[1])
    if train is None and evaluation is None:
        raise DatasetError(
            f"data.dataset: {recipe.dataset!r} has neither the split {recipe.train_split!r} nor "
            f"{recipe.eval_split!r}, it has {', '.join(map(str, available))}; set data.train_split and data.eval_split"
        )
    is_held_out = evaluation is None and names[1] == DataRecipe.eval_split and recipe.held_out > 0
    if evaluation is None and not is_held_out:
        use = (
            "its only split is used whole, to train on or by `isoprune evaluate`"
            if is_undivided
            else f"it has no split {recipe.eval_split!r} but {', '.join(available)}, so nothing is evaluated"
        )
        logger.warning(
            f"data: {recipe.dataset}: {use}; hold images out with data.train_split: train[:90%] and data.eval_split: "
            "train[90%:]"
        )
    elif evaluation is not None and names[1] == DataRecipe.eval_split and evaluation.casefold() not in _VALIDATION:
        logger.info(f"data: the split for evaluation is {evaluation!r}")
    return ChosenSplits(train, evaluation, is_undivided and train is not None, is_held_out)


def is_split_name(name: str, recipe: DataRecipe) -> bool:
    """Return whether a word is a usual name of a split, or one of the recipe's."""
    own = [_name_of(value).casefold() for value in (recipe.train_split, recipe.eval_split)]
    return name.casefold() in (*_TRAIN, *_EVALUATION, *own)


def take_part(split: Split, setting: str, value: str) -> Split:
    """Return the part of a split that a name like `train[:80%]` means; the split itself without brackets.

    Images that are sorted by class are shuffled first, with the same seed for each part, so that every part has every
    class.

    Raises:
        DatasetError: The brackets are not a slice, leave no image, or are those of a stream.
    """
    part = part_of(value)
    if not part:
        return split
    if isinstance(split, IterableDataset):
        raise DatasetError(f"data.{setting}: {value!r} is a part of a split, which a stream cannot have")
    try:
        (found,) = ReadInstruction.from_spec(f"all{part}").to_absolute({"all": len(split)})
    except (ValueError, AssertionError) as error:
        raise DatasetError(f"data.{setting}: {value!r} is no slice such as train[:80%] ({error})") from error
    start, stop = found.from_ or 0, len(split) if found.to is None else found.to
    if start >= stop:
        raise DatasetError(f"data.{setting}: {value!r} has no images, of {len(split)} in the split")
    return split.select(_order(split)[start:stop])


def part_of(value: str) -> str:
    """Return the brackets at the end of a split such as `train[:80%]`; empty without."""
    return value[len(_name_of(value)) :]


def _order(split: Dataset) -> np.ndarray:
    labels = read_strata(split)
    is_sorted = bool((np.diff(labels) >= 0).all()) and labels[0] != labels[-1]
    return np.random.default_rng(0).permutation(len(split)) if is_sorted else np.arange(len(split))


def _find(name: str, available: Sequence[str], usual: Collection[str]) -> str | None:
    """Return the available split of a name, in another case if need be, or of any usual name if this is one."""
    by_case = {key.casefold(): key for key in reversed(available)}
    others = usual if name.casefold() in usual else ()
    exact = [name] if name in available else []
    return next(iter([*exact, *(by_case[word] for word in (name.casefold(), *others) if word in by_case)]), None)


def _name_of(value: str) -> str:
    """Return the name of a split without a slice in brackets."""
    found = re.match(r"(.+?)(?=\[[^\[\]]*\]$)", value)
    return found.group(1) if found else value
