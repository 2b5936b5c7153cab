"""Train a pruned model on images of a data set, or any module on batches: `finetune`."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor, PreTrainedModel

from isoprune_hf.api.batches import CallerBatch, InputKeys, read_batch
from isoprune_hf.api.evaluate import with_logits
from isoprune_hf.api.holding import config_of, inner_of, run_module, share
from isoprune_hf.api.objectives import Chosen, Loss, choose_objective
from isoprune_hf.api.pruned import Pruned
from isoprune_hf.api.random_state import kept_random_state
from isoprune_hf.api.transforms import transformed
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.images import holds_images, holds_rows, open_images
from isoprune_hf.data.labels import align_labels, classes_of, is_own_network
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.models.calling import CallForm
from isoprune_hf.models.drawn_targets import loss_without_labels
from isoprune_hf.models.from_module import classes_in, form_without_labels
from isoprune_hf.models.held import LOSS_NAMES, HeldModel
from isoprune_hf.models.nested import separate
from isoprune_hf.models.objective import LOSSES, chooses_class
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe
from isoprune_hf.training import finetune as training
from isoprune_hf.training.own_batches import OwnBatch, OwnLoss, check_own_recipe, train_on_batches


def finetune(
    model: nn.Module | Pruned,
    data: ImageData | str | Path | DataRecipe | Iterable[Any],
    processor: BaseImageProcessor | None = None,
    recipe: FinetuneRecipe | None = None,
    *,
    accelerator: Accelerator | None = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    inputs: InputKeys | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a model in place and leave it in eval mode.

    Args:
        model: The result of `prune`, whose `model` is trained, or a module; for images see `evaluate_model`.
        data: Images: the result of `load_data`, a name, folder or `DataRecipe`, or rows of `datasets` with images and
            labels, all of which are trained on. Or batches as `prune` takes them, in a new pass for each epoch: a
            loader, a list of batches, or a data set of torch, which is shuffled into batches of `recipe.batch_size`.
        processor: Makes the inputs of images; by default that of the base, if it is known.
        recipe: How to train; by default `FinetuneRecipe()`. On batches its settings of images are refused if they are
            set, and an epoch is `steps_per_epoch` batches or the length of the data.
        accelerator: The ranks; by default a new one. On batches it has one process.
        teacher: Has the outputs of the model: by default the base of a `Pruned`, unless the recipe has no
            distillation or no teacher.
        loss: The loss of batches, see `prune`; by default that of the `Pruned` if it is no function, or the one that
            the targets fit. Batches without targets are trained on the teacher alone.
        inputs: Entries of a batch that the model takes, see `prune`.
        **options: For images: other arguments of `isoprune_hf.training.finetune.finetune`, such as `save` and `run`.

    Returns:
        `history` and `best_epoch`, see `isoprune_hf.training.finetune.finetune`; on batches, where nothing is
        evaluated, an entry has `epoch`, `train_loss`, `lr` and `samples_per_second`.

    Raises:
        RecipeError: No processor is known, or a setting or the loss does not fit.
        DatasetError: The data cannot be opened, have another form or are too few.
    """
    recipe = FinetuneRecipe() if recipe is None else recipe
    accelerator = Accelerator() if accelerator is None else accelerator
    base = _teacher_of(model, recipe) if teacher is None else teacher
    if not holds_images(data):
        if options:
            raise RecipeError(f"finetune: {', '.join(options)} are for images of a data set, not for batches")
        return _finetune_batches(model, data, recipe, accelerator, base, loss, inputs)
    if loss is not None or inputs is not None:
        raise RecipeError("loss and inputs are for batches; images with labels are trained by the cross-entropy")
    student = with_logits(model)
    if isinstance(model, Pruned):
        processor = model.processor if processor is None else processor
        base = HeldModel(model.config, share(base)) if base is not None and teacher is None else base
    if processor is None:
        raise RecipeError("processor is not set: pass the image processor that makes the inputs of the model")
    images, processor = open_images(data), transformed(processor, data)
    if isinstance(student, PreTrainedModel) and not is_own_network(student.config):
        images = align_labels(images, classes_of(student.config))
    return training.finetune(student, images, processor, recipe, accelerator=accelerator, teacher=base, **options)


def _teacher_of(model: nn.Module | Pruned, recipe: FinetuneRecipe) -> nn.Module | None:
    """Return the base of a result, if the recipe takes it as the teacher.

    Raises:
        RecipeError: The recipe names another teacher.
    """
    if recipe.distillation == "none" or recipe.teacher == "none":
        return None
    if recipe.teacher != "auto":
        raise RecipeError(f"finetune.teacher {recipe.teacher}: open it, and pass it as teacher=load_base(...).model")
    if not isinstance(model, Pruned):
        return None
    return model.base


@dataclass(frozen=True, eq=False)
class _Batches:
    """Batches of a caller, read anew in each pass."""

    data: Iterable[Any]
    keys: InputKeys | None
    chosen: Chosen
    form: CallForm
    classes: int | None

    def __iter__(self) -> Iterator[OwnBatch]:
        for whole in self.data:
            batch = read_batch(whole, self.keys)
            shapes = tuple(value.shape[1:] for value in batch.inputs)
            if len(shapes) != len(self.form.shapes):
                raise DatasetError(f"data: a batch has {len(shapes)} inputs, the first one {len(self.form.shapes)}")
            targets = _targets(self.chosen, batch)
            if targets is not None and self.classes is not None and not targets.is_floating_point():
                _check_classes(targets, self.classes)
            yield OwnBatch(batch.inputs, targets)


def _check_classes(targets: Tensor, classes: int) -> None:
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise DatasetError(f"data: a batch has the classes {low} to {high}, the outputs are {classes} classes")


def _targets(chosen: Chosen, batch: CallerBatch) -> Tensor | None:
    """Return the targets of a batch; None if the model's own outputs take their place."""
    has_targets = chosen.targets is not None and chosen.objective.name != "squared outputs"
    return chosen.targets(batch) if chosen.targets is not None and has_targets else None


def _finetune_batches(
    model: nn.Module | Pruned,
    data: Any,
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    teacher: nn.Module | None,
    loss: Loss | None,
    keys: InputKeys | None,
) -> dict[str, Any]:
    """Train on batches; see `finetune`."""
    if accelerator.num_processes > 1:
        raise RecipeError("finetune: batches are trained on by one process; use images, or a loop of your own")
    module = model.model if isinstance(model, Pruned) else model
    with torch.inference_mode(False), kept_random_state():
        torch.manual_seed(recipe.seed)
        loader = _loader(data, recipe)
        start = next(iter(loader), None)
        if start is None:
            raise DatasetError("data: no batch")
        first = read_batch(start, keys)
        task = form_without_labels(inner_of(module))
        kept = task.outputs if task is not None and loss is None else ()
        form = CallForm(first.names, tuple(value.shape[1:] for value in first.inputs), kept)
        output = run_module(share(module).eval(), form, first.inputs)
        chosen = _choose(model, module, first, form, loss, output)
        objective = chosen.objective
        classes = objective.logits(separate(output)[0]).shape[1] if chooses_class(objective) else None
        check_own_recipe(recipe, has_classes=chooses_class(objective))
        if teacher is None and _targets(chosen, first) is None:
            raise RecipeError("finetune: there are neither targets nor a teacher, so nothing can be learned")
        batches = _Batches(loader, keys, chosen, form, classes)
        own_loss = OwnLoss(chosen.objective, form, recipe, None if teacher is None else share(teacher))
        history = train_on_batches(module, batches, own_loss, accelerator, updates=_updates(loader, recipe))
    return {"history": history, "best_epoch": recipe.epochs}


def _loader(data: Any, recipe: FinetuneRecipe) -> Iterable[Any]:
    """Return data that give the batches of an epoch in each pass.

    Raises:
        DatasetError: They give them once, or are no batches.
    """
    if isinstance(data, Dataset) or holds_rows(data):
        return DataLoader(data, recipe.batch_size, shuffle=isinstance(data, Sized), drop_last=recipe.drop_last)
    if isinstance(data, Tensor):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, Iterator | dict):
        raise DatasetError(
            f"data: {type(data).__name__} does not give its batches again for each epoch; pass a loader or a list"
        )
    return data


def _updates(loader: Any, recipe: FinetuneRecipe) -> int:
    if recipe.steps_per_epoch is not None:
        return recipe.steps_per_epoch
    if not isinstance(loader, Sized):
        raise RecipeError("finetune.steps_per_epoch is not set, and the data have no length that would replace it")
    return len(loader)


def _choose(
    model: nn.Module | Pruned,
    module: nn.Module,
    first: CallerBatch,
    form: CallForm,
    loss: Loss | None,
    output: Any,
) -> Chosen:
    """Choose the loss by the first batch."""
    task = form_without_labels(inner_of(module))
    if loss is None and task is not None and not (task.names_classes and isinstance(first.targets, Tensor)):
        return Chosen(loss_without_labels(task, classes_in(inner_of(module))), None)
    known = model.loss if isinstance(model, Pruned) else None
    if loss is None and known in LOSSES and first.targets is not None:
        loss = known
    described = model.config if isinstance(model, Pruned) and model.config.base else config_of(module, None)
    problem = None if described is None else described.problem_type
    return choose_objective(output, [first], form, loss, problem if problem in LOSS_NAMES else None)
