"""Check that a repaired model is closer to its base than one that is only cut, on images that no repair saw."""

from dataclasses import replace
from typing import Any

import torch
from coverage_record import Record, require

from isoprune_hf import IsoPruneForImageClassification, PruneRecipe
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.models.held import HeldModel
from isoprune_hf.models.nested import tensors_of
from isoprune_hf.pruning.prune import PruneResult, prune_model

MICRO_BATCH = 16
_CLEAR = 2  # standard errors
# Beginnings of the notes on a model that no repair brings nearer, and on one that has no layer to fit.
_UNREPAIRED = ("prune.reconstruct none is used", "prune.reconstruct changes nothing")


def check_repair(
    model: IsoPruneForImageClassification,
    result: PruneResult,
    recipe: PruneRecipe,
    batches: Any,
    held_out: tuple[torch.Tensor, torch.Tensor],
    record: Record,
) -> None:
    """Check that the repair brings held-out outputs closer to those of the base, see `errors_of`.

    If the first images show no difference of two standard errors, in either direction, all images decide. A cut model
    that no repair changed is right if its plan says that none is nearest, or that no layer can be fitted; the reason
    is written down.

    Args:
        model: The base.
        result: Its cut.
        recipe: The recipe of the cut.
        batches: The calibration images.
        held_out: Images that decide, and images that decide with them if needed.
        record: The record.
    """
    unrepaired = prune_model(model, replace(recipe, reconstruct="none"), batches, scores=result.scores)
    require(unrepaired.plan.kept == result.plan.kept, "the plan differs without a repair")
    weights = unrepaired.model.state_dict()
    if all(torch.equal(value, weights[name]) for name, value in result.model.state_dict().items()):
        reason = next((note for note in result.plan.notes if note.startswith(_UNREPAIRED)), None)
        require(reason is not None, "no repair changed the weights, and the plan does not say why")
        record.add(unrepaired=reason)
        return
    seen: tuple[torch.Tensor, ...] = ()
    for images in held_out:
        seen = (*seen, images)
        before, after = (errors_of(cut, model, torch.cat(seen)) for cut in (unrepaired.model, result.model))
        gain = before - after
        error = float(gain.std()) / len(gain) ** 0.5
        if abs(float(gain.mean())) > _CLEAR * error:
            break
    text = f"{after.mean():.3g} with the repair, {before.mean():.3g} without"
    record.add(error_unrepaired=float(f"{before.mean():.3g}"), error_repaired=float(f"{after.mean():.3g}"))
    record.add(error_images=len(gain), error_deviation=float(f"{error:.2g}"))
    require(
        bool(gain.mean() > 0), f"the error of the outputs of {len(gain)} images is {text} (standard error {error:.2g})"
    )


def errors_of(
    cut: IsoPruneForImageClassification, base: IsoPruneForImageClassification, images: torch.Tensor
) -> torch.Tensor:
    """Return the error of the outputs of each image, (B,).

    Of logits of classes it is their mean squared error as a share of their variance, of the outputs of other tasks the
    distance by which they are trained: relative squares of features, divergences of pixels and of objects.
    """
    wanted, found = (
        [torch.cat(parts) for parts in zip(*(run(model, part) for part in images.split(MICRO_BATCH)), strict=True)]
        for model in (base, cut)
    )
    if isinstance(base, HeldModel):
        return base.objective.distances(found, wanted).double()
    wanted, found = wanted[0].double(), found[0].double()
    return (found - wanted).square().mean(1) / (wanted - wanted.mean(0)).square().mean()


def run(model: IsoPruneForImageClassification, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the logits (B, num_labels), or the outputs of another task that a cut keeps."""
    with torch.no_grad():
        output = model(images)
    if isinstance(model, HeldModel):
        return output.outputs
    return tensors_of(output, task_of(model.config.base).outputs)
