"""Choose the loss for a model and its data, before any work: `choose_objective`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.api.batches import CallerBatch
from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, describe_error
from isoprune_hf.checkpoint.task_forms import TaskForm
from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.models.caller_loss import BatchForm, CallerLoss
from isoprune_hf.models.calling import CallForm
from isoprune_hf.models.divergence import DIVERGENCES
from isoprune_hf.models.drawn_targets import loss_without_labels
from isoprune_hf.models.held import LOSS_NAMES
from isoprune_hf.models.nested import separate, tensors_of
from isoprune_hf.models.objective import LOSSES, Objective, OutputNorm, TargetLoss, side_by_side

Loss = str | Callable[[Any, Any], Tensor]
_OF_CLASSES = (None, "single_label_classification")  # problem types whose targets are looked at
_MEANINGS = (
    "class indices for cross_entropy, zeros and ones of the shape of the outputs for binary_cross_entropy, other "
    "numbers of that shape for squared_error; or pass loss=callable(outputs, batch)"
)


@dataclass(frozen=True, eq=False)
class Chosen:
    """A loss with its targets.

    Args:
        objective: The loss.
        targets: Returns the targets of a batch, (B, ...); None if they are the classes that the model itself predicts.
    """

    objective: Objective
    targets: Callable[[CallerBatch], Tensor] | None


def choose_objective(
    output: Any, batches: Sequence[CallerBatch], call: CallForm, loss: Loss | None = None, problem: str | None = None
) -> Chosen:
    """Choose the loss that the outputs of a model and the targets of its batches fit, and try it.

    Args:
        output: The output of the model for the first batch.
        batches: The batches.
        call: Inputs of the model.
        loss: A name of `LOSSES`, or `loss(outputs, batch)`; by default that of the problem type, or chosen by types,
            shapes and values.
        problem: Problem type of the model in transformers, if it has one.

    Raises:
        RecipeError: The loss does not fit, or is not a differentiable function of the outputs.
        DatasetError: The targets do not fit the outputs.
    """
    is_unlabelled = all(batch.targets is None for batch in batches)
    if loss is None and problem not in _OF_CLASSES and not is_unlabelled:
        loss = LOSS_NAMES[problem]
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise RecipeError(f"loss must be one of {', '.join(LOSSES)}, or callable(outputs, batch), got {loss!r}")
        chosen = _by_name(output, batches, loss)
    elif loss is not None:
        chosen = _by_caller(output, batches[0], call, loss)
    elif is_unlabelled:
        chosen = unlabelled_objective(output, batches[0], has_classes=problem in _OF_CLASSES)
    else:
        chosen = _by_targets(output, batches)
    _try_once(chosen, output, batches[0], call)
    return chosen


def drawn_objective(output: Any, form: TaskForm, classes: int | None) -> Chosen:
    """Return the loss of a network of a task without labels; those of the batches are not looked at.

    Args:
        output: The output of the network for a batch.
        form: The task.
        classes: The number of classes, if the network has any.
    """
    shapes = [value.shape[1:] for value in tensors_of(output, form.outputs)]
    objective = loss_without_labels(form, classes)
    return Chosen(objective, lambda batch: objective.draw_targets(batch.inputs[0], shapes))


def _by_caller(output: Any, batch: CallerBatch, call: CallForm, loss: Callable[[Any, Any], Tensor]) -> Chosen:
    _, form = separate(output)
    known = BatchForm.of(batch.whole, batch.inputs)
    objective = CallerLoss(loss, form, _compared(output, batch), known, call)
    return Chosen(objective, lambda batch: known.pack(batch.whole))


def _compared(output: Any, batch: CallerBatch) -> tuple[int, ...]:
    """Return the numbers of the output tensors that have an entry for each sample.

    Raises:
        RecipeError: There is none.
    """
    samples = len(batch.inputs[0])
    tensors, _ = separate(output)
    found = [number for number, value in enumerate(tensors) if value.ndim and len(value) == samples]
    found = [number for number in found if tensors[number].is_floating_point()]
    if not found:
        raise RecipeError(f"loss: the model returns no tensor with an entry for each of {samples} samples")
    return tuple(found)


def unlabelled_objective(output: Any, batch: CallerBatch, *, has_classes: bool) -> Chosen:
    """Choose the loss for data without targets: the model's own outputs take their place.

    Args:
        output: The output of the model for the batch.
        batch: A batch.
        has_classes: A single output (B, C) may be logits of classes; otherwise all outputs are compared by squares.
    """
    numbers = _compared(output, batch)
    found = separate(output)[0][numbers[0]]
    if has_classes and len(numbers) == 1 and found.ndim == 2 and found.shape[1] > 1:
        return Chosen(TargetLoss("cross_entropy", numbers[0], has_logits=True), None)
    objective = OutputNorm(partial(side_by_side, numbers=numbers))
    return Chosen(objective, lambda batch: torch.zeros(len(batch.inputs[0])))


def _by_name(output: Any, batches: Sequence[CallerBatch], name: str) -> Chosen:
    number, found = _scored(output, len(batches[0].inputs[0]))
    if name == "cross_entropy" and found.ndim > 1 and found.shape[1] == 1:
        raise RecipeError("loss cross_entropy of a single output is always 0; use binary_cross_entropy for one class")
    objective = TargetLoss(name, number, has_logits=name in DIVERGENCES and found.ndim == 2)
    return Chosen(objective, _given_targets)


def _by_targets(output: Any, batches: Sequence[CallerBatch]) -> Chosen:
    number, found = _scored(output, len(batches[0].inputs[0]))
    has_classes = found.ndim == 2 and found.shape[1] > 1
    targets = [_given_targets(batch) for batch in batches]
    if _are_classes(targets, found) or (has_classes and _are_shares(targets, found)):
        return Chosen(TargetLoss("cross_entropy", number, has_logits=found.ndim == 2), _given_targets)
    if targets[0].numel() == found.numel() and targets[0].ndim in (found.ndim, 1):
        if all(bool(((part == 0) | (part == 1)).all()) for part in targets):
            return Chosen(TargetLoss("binary_cross_entropy", number, has_logits=found.ndim == 2), _given_targets)
        if targets[0].is_floating_point():
            return Chosen(TargetLoss("squared_error", number), _given_targets)
    low, high = min(float(part.min()) for part in targets), max(float(part.max()) for part in targets)
    raise DatasetError(
        f"data: targets of type {targets[0].dtype}, shape {list(targets[0].shape)} and values {low:g} to {high:g} do "
        f"not fit outputs of shape {list(found.shape)}: {_MEANINGS}"
    )


def _scored(output: Any, samples: int) -> tuple[int, Tensor]:
    """Return the output that is compared with targets, and its number among all tensors.

    Raises:
        RecipeError: There are several, or it has no entry for each sample.
    """
    tensors, _ = separate(output)
    named = output.get("logits") if isinstance(output, Mapping) else None
    found = [(number, value) for number, value in enumerate(tensors) if named is None or value is named]
    if len(found) != 1:
        raise RecipeError(
            f"loss: the model returns {len(tensors)} tensors, none of which is named logits; pass "
            "loss=callable(outputs, batch)"
        )
    number, value = found[0]
    if not value.ndim or len(value) != samples or not value.is_floating_point():
        raise RecipeError(
            f"loss: the model returns {value.dtype} of shape {list(value.shape)} for {samples} samples, not "
            "floating-point numbers with an entry for each sample"
        )
    return number, value


def _given_targets(batch: CallerBatch) -> Tensor:
    if not isinstance(batch.targets, Tensor) or not batch.targets.ndim:
        raise DatasetError(
            f"data: the targets of a batch must be one tensor, got {type(batch.targets).__name__}; pass "
            "loss=callable(outputs, batch) for others"
        )
    if len(batch.targets) != len(batch.inputs[0]):
        raise DatasetError(f"data: a batch has {len(batch.inputs[0])} samples and {len(batch.targets)} targets")
    return batch.targets


def _are_classes(targets: Sequence[Tensor], output: Tensor) -> bool:
    """Return whether targets are class indices for outputs (B, classes, ...)."""
    if output.ndim < 2 or output.shape[1] < 2 or targets[0].shape != (len(output), *output.shape[2:]):
        return False
    if any(part.is_floating_point() or part.dtype == torch.bool for part in targets):
        return False
    ignored = -100 if output.ndim > 2 else 0  # cross_entropy leaves out the positions of that class
    return all(bool((((part >= 0) & (part < output.shape[1])) | (part == ignored)).all()) for part in targets)


def _are_shares(targets: Sequence[Tensor], output: Tensor) -> bool:
    """Return whether targets are probabilities of the classes: floating-point numbers that sum to 1."""
    return all(
        part.is_floating_point()
        and part.shape[1:] == output.shape[1:]
        and bool((part >= 0).all())
        and torch.allclose(part.sum(1), torch.ones(len(part), dtype=part.dtype, device=part.device), atol=1e-3)
        for part in targets
    )


def _try_once(chosen: Chosen, output: Any, batch: CallerBatch, call: CallForm) -> None:
    """Compute the loss of the first batch.

    Raises:
        RecipeError: It fails, is not finite, or does not depend on the outputs.
    """
    if chosen.targets is None:
        return
    outputs = [value.detach().clone().requires_grad_(value.is_floating_point()) for value in separate(output)[0]]
    targets = chosen.targets(batch).to(outputs[0].device)
    name = chosen.objective.name
    with torch.enable_grad():
        try:
            inputs = call.pack(batch.inputs).to(outputs[0].device)
            loss = chosen.objective.summed_loss(outputs, targets, inputs)
        except LIBRARY_ERRORS as error:  # of the loss
            raise RecipeError(f"loss {name} fails on the first batch: {describe_error(error)}") from error
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad or not loss.isfinite():
        raise RecipeError(
            f"loss {name} must return a finite tensor, a scalar or one value for each sample, that depends on the "
            f"outputs, got {loss!r:.99}"
        )
