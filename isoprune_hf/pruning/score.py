"""Scoring as a recipe asks for it: heads turned first where they shall be, scores that know their base."""

from collections.abc import Iterator
from dataclasses import replace

from accelerate import Accelerator

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.gradients import Batches
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.repairing.rotation import Rotated, rotate_heads
from isoprune_hf.pruning.scoring.scores import ImportanceScores, score_groups, scoring_options
from isoprune_hf.recipes import PruneRecipe


def score_model(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    calibration: Batches | None = None,
    accelerator: Accelerator | None = None,
    *,
    sample: dict[str, object] | None = None,
) -> ImportanceScores:
    """Score a base as `prune_model` does before its first cut; the arguments are the same.

    Raises:
        RecipeError, UnsupportedArchitectureError: See `score_groups`, `trace_groups` and `rotate_heads`.
    """
    check_calibration(recipe, calibration, None)
    groups = trace_groups(model, recipe.signature, recipe.engine)
    rotated = rotate_base(model, recipe, groups, calibration, accelerator)
    scores = score_as(recipe, rotated.model, groups, find_blocks(model), calibration, accelerator, sample)
    return of_base(scores, model, recipe)


def rotate_base(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    groups: tuple[CoupledGroup, ...],
    calibration: Batches | None,
    accelerator: Accelerator | None,
) -> Rotated:
    """Turn the heads of a base where the recipe asks for it."""
    return rotate_heads(model, groups, calibration, accelerator) if recipe.rotate else Rotated(model, (), ())


def score_as(
    recipe: PruneRecipe,
    model: IsoPruneForImageClassification,
    groups: tuple[CoupledGroup, ...],
    blocks: tuple[ResidualBlock, ...],
    calibration: Batches | None,
    accelerator: Accelerator | None,
    sample: dict[str, object] | None,
) -> ImportanceScores:
    """Score with what a recipe says of scoring."""
    return score_groups(
        model,
        groups,
        blocks=blocks,
        batches=calibration,
        accelerator=accelerator,
        sample=sample,
        **scoring_options(recipe),
    )


def of_base(scores: ImportanceScores, model: IsoPruneForImageClassification, recipe: PruneRecipe) -> ImportanceScores:
    """Give the scores of a rotated model to the base that it was made from."""
    return replace(scores, fingerprint=fingerprint(model.model), rotated=True) if recipe.rotate else scores


def check_scores_of(model: IsoPruneForImageClassification, recipe: PruneRecipe, scores: ImportanceScores) -> None:
    """Refuse scores of another base, or of heads that were turned where these are not."""
    if scores.fingerprint != fingerprint(model.model):
        raise RecipeError(
            "the scores were made from other weights than this base's; run `isoprune score` on this base"
        )
    if scores.rotated != recipe.rotate:
        made = "with" if scores.rotated else "without"
        raise RecipeError(f"the scores were made {made} prune.rotate: set it to {str(scores.rotated).lower()}")


def check_calibration(recipe: PruneRecipe, calibration: Batches | None, scores: ImportanceScores | None) -> None:
    """Refuse a sample that the recipe cannot do with, and scores that contradict it."""
    if recipe.steps > 1 and scores is not None:
        raise RecipeError(
            f"prune.steps {recipe.steps} scores anew before each step: leave --scores out, or set it to 1"
        )
    if recipe.data_step is not None and calibration is None:
        raise RecipeError(f"prune.{recipe.data_step} needs data: give --data.dataset, or leave it out")
    if (recipe.steps > 1 or recipe.data_step is not None) and isinstance(calibration, Iterator):
        raise RecipeError(
            f"prune.{'steps' if recipe.steps > 1 else recipe.data_step} goes through the calibration batches several "
            "times: give a list or a loader, not an iterator"
        )
