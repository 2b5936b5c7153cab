"""Divide a data set into the images for training and those for evaluation: `divide`.

Where it has no split for evaluation, images of the training split are held out for it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from isoprune_hf.data.label_columns import Split, read_strata
from isoprune_hf.data.splits import ChosenSplits, part_of, take_part
from isoprune_hf.recipes import DataRecipe

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

HOLDOUT_SEED = 0


@dataclass(frozen=True)
class Division:
    """The images of a recipe.

    Args:
        train: For training; None if there are none.
        evaluation: For evaluation; None if there are none.
        eval_name: Name of the split of `evaluation`.
        held_out_of: Number of training images that `evaluation` was held out of; None if it has a split of its own.
    """

    train: Split | None
    evaluation: Split | None
    eval_name: str | None
    held_out_of: int | None


def divide(splits: Mapping[str, Split], chosen: ChosenSplits, recipe: DataRecipe) -> Division:
    """Return the parts of the splits that a recipe means; without a split for evaluation, one is held out.

    Brackets such as those of `train[:80%]` are applied to the images that remain, so that they change nothing of which
    images are held out.

    Raises:
        DatasetError: The brackets of a split do not fit it, see `take_part`.
    """
    train = splits[chosen.train] if chosen.train else None
    evaluation = splits[chosen.evaluation] if chosen.evaluation else None
    held_out_of = None
    if chosen.is_held_out and isinstance(train, Dataset):
        rest, evaluation = _hold_out(train, recipe)
        train, held_out_of = rest, None if evaluation is None else len(train)
    name = chosen.evaluation or chosen.train
    return Division(
        train=None if train is None else take_part(train, "train_split", recipe.train_split),
        evaluation=None if evaluation is None else take_part(evaluation, "eval_split", recipe.eval_split),
        eval_name=None if evaluation is None else f"{name}{part_of(recipe.eval_split)}",
        held_out_of=held_out_of,
    )


def _hold_out(split: Dataset, recipe: DataRecipe) -> tuple[Dataset, Dataset | None]:
    """Divide a training split into the images that are trained on, and those that are held out for evaluation.

    Both have the order of the split, and each class gives up the same share, to one image; of lists of classes, each
    set of classes does. Which images are held out
    depends on the labels of the whole split and on `data.holdout` alone, so that every stage holds out the same ones.

    Returns:
        The rest, and the images that are held out; None for them if the share is less than half an image.
    """
    total = len(split)
    held_out = min(round(recipe.held_out * total), total - 1)
    if held_out < 1:
        logger.warning(
            f"data: {recipe.dataset} has no split for evaluation, and {total} images are too few to hold some out, so "
            "nothing is evaluated"
        )
        return split, None
    logger.warning(
        f"data: {recipe.dataset} has no split for evaluation: {held_out:,} of {total:,} training images are held out "
        f"by seed {HOLDOUT_SEED} and used for nothing else; data.holdout sets their share, and 0 holds none out"
    )
    order = np.random.default_rng(HOLDOUT_SEED).permutation(total)
    order = order[np.argsort(read_strata(split)[order], kind="stable")]
    is_held_out = np.zeros(total, dtype=bool)
    is_held_out[order[((np.arange(held_out) + 0.5) * total / held_out).astype(int)]] = True
    return split.select(np.flatnonzero(~is_held_out)), split.select(np.flatnonzero(is_held_out))
