"""Score a base according to a recipe: rotate attention heads first if requested, and record which base was scored.

`score_model` is the complete pipeline; `prune_model` uses its parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn, cast

import torch
from accelerate import Accelerator

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.errors import RecipeError, UnsupportedArchitectureError
from isoprune_hf.pruning.calibration.calibration import Batches, Calibration
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.finite import check_inputs, check_logits
from isoprune_hf.pruning.graph.blocks import find_blocks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.precision import in_float32
from isoprune_hf.pruning.graph.tracer import FORWARD_ERRORS
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.repairing.rotation import Rotated, rotate_heads
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.pruning.scoring.scores import ImportanceScores, Sample
from isoprune_hf.recipes import Criterion, PruneRecipe


def score_model(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    calibration: Batches | None = None,
    accelerator: Accelerator | None = None,
    *,
    sample: Sample | None = None,
) -> ImportanceScores:
    """Score a base exactly as `prune_model` does before its first cut.

    Args:
        model: The base, of `load_base`; left untouched.
        recipe: How to score, and whether to rotate the heads before.
        calibration: This rank's micro-batches (images (B, C, H, W), labels (B,)), for recipes that read images.
        accelerator: Ranks that share the images.
        sample: Description of the batches, recorded with the scores.

    Raises:
        RecipeError, UnsupportedArchitectureError: See `score_groups`, `trace_groups` and `rotate_heads`.
    """
    check_inputs(model, calibration)
    recipe = recipe.settled(has_images=calibration is not None)
    check_calibration(recipe, calibration, None)
    images = None if calibration is None else Calibration(calibration, accelerator)
    groups = trace_groups(model, recipe.signature, recipe.engine)
    rotated = rotate_base(model, recipe, groups, images)
    scores = score_with_recipe(rotated.model, recipe, groups, images, blocks=find_blocks(model), sample=sample)
    return assign_to_base(scores, rotated.model, model, recipe)


def rotate_base(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    groups: Sequence[CoupledGroup],
    calibration: Calibration | None,
) -> Rotated:
    """Return the base in float32, with rotated heads if the recipe requests it.

    A recipe that reads no images ranks and moves weights, both exact in every type: the base is returned as it is.

    Raises:
        RecipeError: The logits of the base are not finite; see also `check_calibration` and `rotate_heads`.
        UnsupportedArchitectureError: The base does not run in float32.
    """
    if recipe.reads_images is None:
        return Rotated(model, (), ())
    wide = in_float32(model)
    if wide is not model:
        _check_runs(wide)
    if calibration is not None:
        check_logits(wide, calibration)
    if not recipe.rotate:
        return Rotated(wide, (), ())
    if calibration is None:
        _refuse_missing_data("rotate")
    return rotate_heads(wide, groups, calibration.batches, calibration.accelerator)


def _check_runs(wide: IsoPruneForImageClassification) -> None:
    """Raise an UnsupportedArchitectureError if a copy in float32 does not run on a blank image."""
    image = torch.zeros(1, *image_size_of(wide), device=wide.device)
    try:
        with scoring_mode(wide, requires_grad=False), torch.no_grad():
            wide(pixel_values=image)
    except FORWARD_ERRORS as error:
        raise UnsupportedArchitectureError(
            f"{type(wide.model).__name__} does not run in float32, in which half precision is scored ({error}): cast "
            "to the type of a weight, as in x.to(self.layer.weight.dtype), instead of a fixed type"
        ) from error


def score_with_recipe(
    model: IsoPruneForImageClassification,
    recipe: PruneRecipe,
    groups: Sequence[CoupledGroup],
    calibration: Calibration | None = None,
    *,
    blocks: Sequence[ResidualBlock] = (),
    sample: Sample | None = None,
) -> ImportanceScores:
    """Score groups and blocks with the settings of a recipe; its `scoring_precision` replaces the calibration's.

    Raises:
        RecipeError: See `score_groups`.
    """
    return score_groups(
        model,
        groups,
        criterion=cast("Criterion", recipe.criterion),  # None only until the recipe is settled
        batches=None if calibration is None else calibration.batches,
        accelerator=None if calibration is None else calibration.accelerator,
        seed=recipe.seed,
        sample=sample,
        reduction=recipe.reduction,
        score_batchnorm=recipe.score_batchnorm,
        precision=recipe.scoring_precision,
        blocks=blocks,
    )


def assign_to_base(
    scores: ImportanceScores,
    scored: IsoPruneForImageClassification,
    base: IsoPruneForImageClassification,
    recipe: PruneRecipe,
) -> ImportanceScores:
    """Return scores of a base in float32, with or without rotated heads, with the fingerprint of the base itself.

    Args:
        scores: Scores of `scored`.
        scored: The base itself, or a copy in float32 or with rotated heads.
        base: The base.
        recipe: Its `rotate` is recorded.
    """
    key = scores.fingerprint if scored is base else fingerprint(base.model)
    return replace(scores, fingerprint=key, rotated=bool(recipe.rotate))


def check_scores(model: IsoPruneForImageClassification, recipe: PruneRecipe, scores: ImportanceScores) -> None:
    """Check that scores belong to this base, and to heads that are rotated as in the recipe.

    Raises:
        RecipeError: They do not.
    """
    if scores.fingerprint != fingerprint(model.model):
        raise RecipeError(
            "the scores were made from other weights than this base's; run `isoprune score` on this base"
        )
    if scores.rotated != recipe.rotate:
        made = "with" if scores.rotated else "without"
        raise RecipeError(f"the scores were made {made} prune.rotate: set it to {str(scores.rotated).lower()}")


def check_calibration(recipe: PruneRecipe, calibration: Batches | None, scores: ImportanceScores | None) -> None:
    """Check that the calibration batches and the scores, if there are any, are what a recipe needs.

    Raises:
        RecipeError: Batches are missing, cannot be iterated over several times, or scores contradict `steps`.
    """
    if recipe.steps > 1 and scores is not None:
        raise RecipeError(
            f"prune.steps {recipe.steps} computes new scores before each step: omit --scores, or set it to 1"
        )
    if recipe.data_step is not None and calibration is None:
        _refuse_missing_data(recipe.data_step)
    if (recipe.steps > 1 or recipe.data_step is not None) and isinstance(calibration, Iterator):
        raise RecipeError(
            f"prune.{'steps' if recipe.steps > 1 else recipe.data_step} iterates over the calibration batches several "
            "times: pass a list or a loader, not an iterator"
        )


def _refuse_missing_data(setting: str) -> NoReturn:
    raise RecipeError(f"prune.{setting} needs data: set --data.dataset, or remove the setting")
