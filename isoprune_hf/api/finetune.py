"""Train a pruned model on a data set of images: `finetune`."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.api.holding import share
from isoprune_hf.api.pruned import Pruned
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.images import holds_images, open_images
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.held import HeldModel
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe
from isoprune_hf.training import finetune as training


def finetune(
    model: nn.Module | Pruned,
    data: ImageData | str | Path | DataRecipe | Any,
    processor: BaseImageProcessor | None = None,
    recipe: FinetuneRecipe | None = None,
    *,
    accelerator: Accelerator | None = None,
    teacher: nn.Module | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a model in place and leave it in eval mode.

    Args:
        model: The result of `prune`, whose `model` is trained, or a model that returns `.logits`.
        data: The result of `load_data`, or a name, folder or `DataRecipe` of images; or rows of `datasets` with images
            and labels, all of which are trained on. For batches of your own, write a loop or use a Trainer.
        processor: Makes the inputs; by default that of the base, if it is known.
        recipe: How to train; by default `FinetuneRecipe()`.
        accelerator: The ranks; by default a new one.
        teacher: Returns `.logits` of the same classes; by default the base of a `Pruned`, unless the recipe has no
            distillation or no teacher.
        **options: Other arguments of `isoprune_hf.training.finetune.finetune`, such as `save` and `run`.

    Returns:
        `history` and `best_epoch`, see `isoprune_hf.training.finetune.finetune`.

    Raises:
        RecipeError: The data are no images, no processor is known, or a setting does not fit.
        DatasetError: The data cannot be opened or are too few.
    """
    recipe = FinetuneRecipe() if recipe is None else recipe
    student: nn.Module = _student(model) if isinstance(model, Pruned) else model
    if isinstance(model, Pruned):
        processor = model.processor if processor is None else processor
        if teacher is None and recipe.distillation != "none" and recipe.teacher == "auto":
            teacher = HeldModel(model.config, share(model.base))
    if processor is None:
        raise RecipeError("processor is not set: pass the image processor that makes the inputs of the model")
    if not isinstance(data, ImageData) and not holds_images(data):
        raise RecipeError(
            f"data must be images: a name, folder, DataRecipe or rows of datasets, got {type(data).__name__}; train "
            "on other batches in a loop of your own, as docs/pytorch.md shows"
        )
    images = data if isinstance(data, ImageData) else open_images(data)
    accelerator = Accelerator() if accelerator is None else accelerator
    return training.finetune(student, images, processor, recipe, accelerator=accelerator, teacher=teacher, **options)


def _student(pruned: Pruned) -> nn.Module:
    """Return the module of a result in the form that the training takes; its weights are those of the result."""
    if isinstance(pruned.model, IsoPruneForImageClassification):
        return pruned.model
    return HeldModel(pruned.config, pruned.model)
