"""Gradients of the loss over the calibration images of all ranks, and the mode that a model is in for them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.resumable import left_for

IMAGES = ".images"  # beside sums by name: no name of a module starts with a dot
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Precision = Literal["no", "bf16"]
Tensors = TypeVar("Tensors")


def mean_gradients(
    model: nn.Module,
    names: Iterable[str],
    batches: Batches,
    accelerator: Accelerator | None = None,
    precision: Precision = "no",
) -> dict[str, torch.Tensor]:
    """Take the mean gradient of the cross-entropy over all images of all ranks.

    Sums are taken in float64, of the loss summed over a micro-batch, and added over ranks once at the end: the float32
    result does not depend on how many ranks shared the batches. Absolute values come after that, never before.

    Args:
        model: Its `model` owns the parameters; its forward returns `logits`. Left as it was.
        names: Parameters, relative to `model.model`.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        accelerator: Ranks that share the images.
        precision: bf16 runs forward and backward under autocast; the sums stay float64.

    Returns:
        Name -> gradient in float32, of the shape of the parameter; zero where the loss does not depend on it.

    Raises:
        RecipeError: There is no image, or a gradient is not finite.
    """
    parameters = {name: model.model.get_parameter(name) for name in names}
    sums, images = zero_sums(parameters), zero_images(model)
    with scoring_mode(model, requires_grad=True):
        for pixel_values, labels in left_for({**sums, IMAGES: images}, batches):
            loss = summed_loss(model, pixel_values.to(model.device), labels.to(model.device), precision)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
            images += len(labels)
    return mean_over_ranks(sums, images, accelerator)


def summed_loss(
    model: nn.Module,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision,
    instead: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sum the cross-entropy over the images: a scalar.

    Args:
        model: Its `model` owns the parameters; its forward returns `logits`.
        pixel_values: (B, C, H, W).
        labels: (B,).
        precision: bf16 runs under autocast.
        instead: Tensors to use in the place of parameters of `model.model`.
    """
    replaced = {f"model.{name}": value for name, value in (instead or {}).items()}
    with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = torch.func.functional_call(model, replaced, (), {"pixel_values": pixel_values}).logits
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


@contextmanager
def scoring_mode(model: nn.Module, *, requires_grad: bool) -> Iterator[None]:
    """Put the model into eval mode, its parameters all with or all without gradient; afterwards it is as it was.

    cuDNN neither searches for kernels nor rounds to TF32 meanwhile: the same images give the same bits on any rank.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for parameter in flags:
        parameter.requires_grad_(requires_grad)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
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
    """Make a float64 sum for each parameter, where the parameter lies."""
    return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}


def zero_images(model: nn.Module) -> torch.Tensor:
    """Make a count of images, which is kept beside the sums over them."""
    return torch.zeros((), dtype=torch.int64, device=model.device)


def mean_over_ranks(
    sums: Mapping[str, torch.Tensor], images: torch.Tensor, accelerator: Accelerator | None
) -> dict[str, torch.Tensor]:
    """Add sums and image counts over all ranks, once, and divide: name -> mean in float32, equal on all ranks.

    Raises:
        RecipeError: No rank has an image, or a mean is not finite.
    """
    sums, count = sum_over_ranks((dict(sums), images), accelerator)
    if not count:
        raise RecipeError("the calibration sample holds no image: scoring needs at least one in the training split")
    means = {name: (total / count).float() for name, total in sums.items()}
    check_finite(means, "gradients")
    return means


def sum_over_ranks(values: Tensors, accelerator: Accelerator | None) -> Tensors:
    """Add tensors, in tuples, lists and dictionaries, over all ranks."""
    return values if accelerator is None or accelerator.num_processes == 1 else accelerator.reduce(values, "sum")


def check_finite(values: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse nan and inf.

    Raises:
        RecipeError: Names the first parameter or layer with such a value.
    """
    for name, value in values.items():
        # A sum is ten times faster, and infinite for a few finite values only.
        if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise RecipeError(
                f"the {what} of {name} hold nan or inf, so nothing can be ranked: check the weights of the base and "
                "the images, and score with --prune.scoring_precision no"
            )
