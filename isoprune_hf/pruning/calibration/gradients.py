"""Gradients of the loss over the calibration images of all ranks.

`mean_gradients` is the complete computation; the other functions are the parts of it that the criteria and repairs
reuse: the mode of the model, the loss, the sums in float64 and their reduction over ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar, cast

import torch
from accelerate import Accelerator

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.held import loss_of_batch
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.pass_state import undoing_passes
from isoprune_hf.pruning.calibration.resumable import remaining
from isoprune_hf.recipes.values import Precision

IMAGES = ".images"  # key of the image count next to sums by module name: no module name starts with a dot
Reducible = TypeVar("Reducible")  # a tensor, or tuples, lists and dictionaries of tensors


def mean_gradients(
    model: IsoPruneForImageClassification, names: Iterable[str], calibration: Calibration
) -> dict[str, torch.Tensor]:
    """Compute the mean gradient of the cross-entropy over all images of all ranks.

    The loss is summed over a micro-batch, its gradients are added up in float64, and the sums are reduced over ranks
    once at the end: the float32 result does not depend on how many ranks shared the batches. Absolute values must
    only be taken of this result.

    Args:
        model: Its `model` owns the parameters; its forward pass returns `logits`. Restored afterwards.
        names: Parameters, relative to `model.model`.
        calibration: Images and labels; a pass that was interrupted resumes if the batches are `ResumableBatches`.

    Returns:
        Name -> gradient in float32, of the shape of the parameter; zero if the loss does not depend on it.

    Raises:
        RecipeError: There is no image.
    """
    parameters = {name: model.model.get_parameter(name) for name in names}
    if not parameters:
        return {}
    sums = zero_sums(parameters)
    images = zero_images(model)
    with scoring_mode(model, requires_grad=True):
        for pixel_values, labels in remaining({**sums, IMAGES: images}, calibration):
            loss = summed_loss(model, pixel_values.to(model.device), labels.to(model.device), calibration.precision)
            gradients = loss_gradients(loss, list(parameters.values()))
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
            images += len(labels)
    return mean_over_ranks(sums, images, calibration.accelerator)


def loss_gradients(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    """Return the gradients of a loss by parameters; None for those that it does not depend on.

    Raises:
        RecipeError: The network runs layers in reentrant activation checkpointing.
    """
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RecipeError(
            "the network runs layers in torch.utils.checkpoint with use_reentrant=True, which gives this criterion no "
            "gradients: turn activation checkpointing off, or set use_reentrant=False"
        ) from error


def summed_loss(
    model: IsoPruneForImageClassification,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision,
) -> torch.Tensor:
    """Compute the loss summed over the images: a scalar.

    Args:
        model: Its `model` owns the parameters; its forward pass returns `logits`.
        pixel_values: (B, C, H, W).
        labels: (B,), or other targets of the loss of the model.
        precision: bf16 runs the forward pass under autocast.
    """
    with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return loss_of_batch(model, pixel_values, labels)


@contextmanager
def scoring_mode(model: IsoPruneForImageClassification, *, requires_grad: bool) -> Iterator[None]:
    """Set eval mode and `requires_grad` of all parameters within the context; both are restored afterwards.

    Within the context, cuDNN neither searches for kernels nor rounds to TF32: the same images give the same bits on
    every rank.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    for parameter in flags:
        parameter.requires_grad_(requires_grad)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(undoing_passes(model))
            if model.device.type == "cuda":
                stack.enter_context(
                    torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
                )
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def zero_sums(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a float64 zero tensor for each parameter, of its shape and on its device."""
    return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}


def zero_images(model: IsoPruneForImageClassification) -> torch.Tensor:
    """Return a scalar int64 zero on the device of the model, to count images in."""
    return torch.zeros((), dtype=torch.int64, device=model.device)


def mean_over_ranks(
    sums: Mapping[str, torch.Tensor], images: torch.Tensor, accelerator: Accelerator | None
) -> dict[str, torch.Tensor]:
    """Reduce sums and image counts over all ranks, once, and divide: name -> mean in float32, equal on all ranks.

    Raises:
        RecipeError: No rank has an image.
    """
    totals, count = sum_over_ranks((dict(sums), images), accelerator)
    require_images(count)
    return {name: (total / count).float() for name, total in totals.items()}


def require_images(count: torch.Tensor, setting: str = "scoring") -> None:
    """Raise a RecipeError if the images of all ranks are none.

    Args:
        count: Number of images (or of rows computed from them) of all ranks: a scalar.
        setting: What needs them: `scoring`, or the name of a setting.
    """
    if not count:
        where = " in the training split" if setting == "scoring" else ""
        raise RecipeError(f"the calibration sample contains no image: {setting} needs at least one{where}")


def sum_over_ranks(values: Reducible, accelerator: Accelerator | None) -> Reducible:
    """Return the sums of tensors over all ranks, in the same tuples, lists and dictionaries."""
    if accelerator is None or accelerator.num_processes == 1:
        return values
    return cast("Reducible", accelerator.reduce(values, "sum"))  # accelerate annotates neither


def check_finite(values: Mapping[str, torch.Tensor], kind: str) -> None:
    """Raise a RecipeError that names the first parameter, layer or group whose tensor contains nan or inf.

    Args:
        values: Name -> tensor.
        kind: What the tensors are, in the plural.
    """
    for name, value in values.items():
        # A sum is ten times faster than a test of every element, and rarely overflows for finite elements.
        if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise RecipeError(
                f"the {kind} of {name} contain nan or inf, so nothing can be ranked: check the weights of the base "
                "and the images, and score with --prune.scoring_precision no"
            )
