"""Evaluate a result of `prune`, or any classifier of images: `evaluate_model`."""

import copy
import inspect

from accelerate import Accelerator
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.api.holding import inner_of, share
from isoprune_hf.api.pruned import Pruned
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.data.decoding import Decoding, Rows
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import RecipeError
from isoprune_hf.evaluation import evaluate
from isoprune_hf.models.base import hold_unlabelled
from isoprune_hf.models.from_module import form_without_labels
from isoprune_hf.models.held import HeldModel
from isoprune_hf.tasks.registry import TASKS


def evaluate_model(
    model: nn.Module | Pruned,
    split: Rows,
    processor: BaseImageProcessor | None = None,
    *,
    accelerator: Accelerator | None = None,
    batch_size: int = 64,
    num_workers: int | None = 0,
    decoding: Decoding | None = None,
) -> dict[str, float | int]:
    """Evaluate an image classifier, or a result of another task, on its current device.

    Args:
        model: The result of `prune`, or a module that takes images (B, C, H, W) and returns logits (B, classes), as a
            tensor or as `.logits`.
        split: Images with the columns `image` and `label`, such as `load_data(...).evaluation`.
        processor: Makes the pixel values; by default that of the base of a result, if it is known.
        accelerator: The ranks that share the work; one process by default. All ranks must call this with the same
            split.
        batch_size: Images in a batch on each rank.
        num_workers: Loader processes on each rank; None chooses them.
        decoding: How images are read; by default, an image that cannot be read is an error.

    Returns:
        `top1` and `top5` as fractions, `loss` (mean cross-entropy in float64), `ece` (expected calibration error over
        15 bins, a fraction) and `images`; the same on every rank. If images could not be read, `broken` is their
        number. Of a result of a task without labels the figures of the task, by which it is compared with its base.

    Raises:
        RecipeError: No processor is known.
        DatasetError: An image cannot be read, or more images than the policy allows, or the model does not choose one
            of several classes.
    """
    maker = model.processor if isinstance(model, Pruned) and processor is None else processor
    if maker is None:
        raise RecipeError("processor is not set: pass the image processor that makes the inputs of the model")
    form = form_without_labels(inner_of(model.model)) if isinstance(model, Pruned) else None
    if isinstance(model, Pruned) and form is not None:
        found, dense = (
            hold_unlabelled(copy.deepcopy(model.config), share(inner_of(part))) for part in (model.model, model.base)
        )
        options = LoaderOptions(batch_size, num_workers, decoding or Decoding())
        return TASKS[form.task].evaluate(found, dense, split, maker, options, accelerator=accelerator)
    return evaluate.evaluate_model(
        with_logits(model),
        split,
        maker,
        accelerator=accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
        decoding=decoding,
    )


def with_logits(model: nn.Module | Pruned) -> nn.Module:
    """Return a model in the form that evaluation and training take; its weights are those of the model.

    Raises:
        RecipeError: It is of another task.
    """
    config = model.config if isinstance(model, Pruned) else IsoPruneConfig()
    module = model.model if isinstance(model, Pruned) else model
    form = form_without_labels(inner_of(module))
    if form is not None:
        raise RecipeError(
            f"{type(inner_of(module)).__name__} is for {form.task}, not a classifier: evaluate the result of prune, "
            "or its folder with `isoprune evaluate`, and finetune it on batches of tensors"
        )
    if isinstance(module, IsoPruneForImageClassification):
        return module
    parameters = inspect.signature(module.forward).parameters
    takes_pixels = "pixel_values" in parameters or any(
        found.kind is found.VAR_KEYWORD for found in parameters.values()
    )
    return module if takes_pixels and not isinstance(model, Pruned) else HeldModel(config, module)
