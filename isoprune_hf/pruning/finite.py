"""Keep nan and inf out of a pruning: `check_inputs` and `check_logits` before the work, `in_usable_types` after it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator

from isoprune_hf.checkpoint.finite import describe_not_finite
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning.calibration.calibration import Batches, Calibration, finite_batches
from isoprune_hf.pruning.calibration.gradients import scoring_mode, sum_over_ranks, zero_images
from isoprune_hf.pruning.graph.precision import in_float32, in_stored_types

_NUM_IMAGES = 2  # random ones


def check_inputs(model: IsoPruneForImageClassification, batches: Batches | None) -> None:
    """Check that all saved tensors of a base are finite, and the calibration images that are in memory.

    Images that a loader reads are checked when they are read.

    Raises:
        RecipeError: One is not; the message names it.
    """
    fault = describe_not_finite(model.model)
    if fault is not None:
        raise RecipeError(
            f"the base cannot be pruned: {fault}; its weights are damaged or its training has diverged, so use others"
        )
    if isinstance(batches, Sequence):
        for _ in finite_batches(batches):
            pass


def check_logits(model: IsoPruneForImageClassification, calibration: Calibration) -> None:
    """Check the logits of a base on the first micro-batch, unless the batches can be iterated over only once.

    Raises:
        RecipeError: They are not finite on some rank.
    """
    if not _has_finite_logits(model, _first_images(calibration), calibration.accelerator):
        raise RecipeError(
            "the logits of the base contain nan or inf on the calibration images, so nothing can be decided from "
            "them: check its weights and the images with `isoprune evaluate`"
        )


def in_usable_types(
    pruned: IsoPruneForImageClassification, base: IsoPruneForImageClassification, calibration: Calibration | None
) -> tuple[IsoPruneForImageClassification, tuple[str, ...]]:
    """Return a cut model in the types of its base, or in float32 where it does not work in them.

    Args:
        pruned: The cut model, in float32 or in the types of the base.
        base: The base.
        calibration: Images of which the first micro-batch is tried if it is in memory; random images are always tried.

    Returns:
        The model, and a line if it stays in float32.

    Raises:
        RecipeError: A weight or the logits are not finite in float32 either.
    """
    in_memory = calibration is not None and isinstance(calibration.batches, Sequence)
    probes = [*_first_images(calibration if in_memory else None), *_random_images(base)]
    accelerator = None if calibration is None else calibration.accelerator
    stored, notes = in_stored_types(pruned, base)
    fault = describe_not_finite(stored.model)
    if fault is None and _has_finite_logits(stored, probes, accelerator):
        return stored, notes
    wide = in_float32(pruned)
    is_narrow = stored.dtype != wide.dtype
    if is_narrow and describe_not_finite(wide.model) is None and _has_finite_logits(wide, probes, accelerator):
        return wide, (f"the weights stay in float32: in {stored.dtype} the logits are not finite",)
    raise RecipeError(
        f"the pruned model is not returned, since {fault or 'its logits contain nan or inf'}: use "
        "--prune.reconstruct none, and check the weights of the base for values that are far larger than all others"
    )


def _has_finite_logits(
    model: IsoPruneForImageClassification, probes: Iterable[torch.Tensor], accelerator: Accelerator | None
) -> bool:
    """Return whether the logits of all probes are finite, on all ranks."""
    broken = zero_images(model)
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        for images in probes:
            logits = model(pixel_values=images.to(model.device, model.dtype)).logits
            broken += (~logits.isfinite()).sum()
    return not sum_over_ranks(broken, accelerator)


def _first_images(calibration: Calibration | None) -> list[torch.Tensor]:
    """Return the images of the first micro-batch in a list; none if they can be read only once."""
    if calibration is None or isinstance(calibration.batches, Iterator):
        return []
    return [images for images, _ in itertools.islice(calibration.batches, 1)]


def _random_images(model: IsoPruneForImageClassification) -> list[torch.Tensor]:
    """Return random images in a list; none for a held model, whose inputs may not be any numbers."""
    size = model.config.image_size
    if size is None or isinstance(model, HeldModel):
        return []
    return [torch.randn(_NUM_IMAGES, *size, generator=torch.Generator().manual_seed(0))]
