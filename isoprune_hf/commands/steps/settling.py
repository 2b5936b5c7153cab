"""Settle the section `prune` before anything is opened, when it is known which images and scores a stage has."""

from typing import NamedTuple, NoReturn

from accelerate.logging import get_logger

from isoprune_hf.data.dataset import ImageData
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.pruning.deciding.make_plan import recipe_of_scores
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe

logger = get_logger(__name__)


class Settled(NamedTuple):
    """How a stage scores and cuts.

    Args:
        prune: The section, with a value for every setting.
        scores: Scores of a file; None if the stage computes them.
        reader: The setting that reads training images, of the steps that remain; None if none does.
    """

    prune: PruneRecipe
    scores: ImportanceScores | None
    reader: str | None


def settle(
    prune: PruneRecipe, images: ImageData | None, scores_file: str | None = None, *, only_decides: bool = False
) -> Settled:
    """Read a file of scores if one is given, and settle the section by the scores and by whether there are images.

    Args:
        prune: The section as it was given.
        images: The opened data set, if there is one; only its training split is scored on and repaired with.
        scores_file: File of scores.
        only_decides: The stage cuts nothing, so that known scores need no images.

    Raises:
        RecipeError: A setting needs images and there are none, or contradicts the scores.
        DatasetError: A setting needs images and there is no training split.
    """
    model_of(prune)
    scores = None if scores_file is None else ImportanceScores.load(scores_file)
    if scores is not None:
        prune = recipe_of_scores(prune, scores)
    prune = prune.settled(has_images=images is not None and images.train is not None)
    reader = prune.reads_images if scores is None else None if only_decides else prune.data_step
    if images is None and reader is not None:
        _refuse_missing_images(prune, reader)
    if images is not None and images.train is None and reader is not None:
        raise DatasetError(f"data: {images.name} has no training split to score on; set data.train_split")
    _log_settings(prune)
    return Settled(prune, scores, reader)


def model_of(prune: PruneRecipe) -> str:
    """Return the name of the base.

    Raises:
        RecipeError: None is set.
    """
    if prune.model is None:
        raise RecipeError(
            "prune.model is not set; set --prune.model, for example timm/resnet50.a1_in1k, or a recipe with --config"
        )
    return prune.model


def _log_settings(prune: PruneRecipe) -> None:
    replaced = prune.replaced_by_preset()
    if replaced:
        changes = ", ".join(
            f"{name} {value}" + (f" (not {default})" if default is not None else "")
            for name, (default, value) in replaced.items()
        )
        logger.info(f"prune.preset {prune.preset} sets {changes}")
    elif prune.preset is None and prune.reads_images is None:
        logger.info(
            f"{prune.criterion} scores the weights alone, and without images nothing is repaired: expect much less "
            "accuracy before finetuning; --data DIR keeps most of it"
        )


def _refuse_missing_images(prune: PruneRecipe, reader: str) -> NoReturn:
    if reader == "criterion":
        raise RecipeError(f"criterion {prune.criterion} needs data: set --data.dataset, or use --prune.criterion l1")
    raise RecipeError(f"prune.{reader} needs data: set --data.dataset, or remove the setting")
