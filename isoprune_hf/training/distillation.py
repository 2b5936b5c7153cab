"""The training loss of labels and teacher, and the two heads of models with a distillation token."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from isoprune_hf.errors import RecipeError
from isoprune_hf.models.divergence import label_divergence
from isoprune_hf.recipes import FinetuneRecipe

# Returns the logits of the class token and of the distillation token, (B, C) each, of the last forward pass.
HeadLogits = Callable[[], tuple[Tensor, Tensor]]

# Names of the classifiers of the class token and of the distillation token: in timm, in transformers.
_HEADS = (("head", "head_dist"), ("cls_classifier", "distillation_classifier"))


def training_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    *,
    label_smoothing: float,
    distillation: Literal["none", "soft", "hard"],
    weight: float,
    temperature: float,
    taught_logits: Tensor | None = None,
    teacher_label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of each sample in fp32.

    Args:
        logits: Logits of the student, of shape (B, C).
        labels: Class indices of shape (B,), or targets of shape (B, C).
        teacher_logits: Logits of the teacher, of shape (B, C); without them the loss is the cross-entropy.
        label_smoothing: Share of the target that is spread over all classes.
        distillation: `soft` compares the two distributions, `hard` uses the teacher's top class as a second label.
        weight: Weight of the teacher's loss, from 0 to 1.
        temperature: Divides both logits in soft distillation; unused in hard distillation.
        taught_logits: Logits of the student that are compared with the teacher, of shape (B, C); `logits` by default.
        teacher_label_smoothing: `label_smoothing` for the teacher's top class.

    Returns:
        Losses of shape (B,).

    Source:
        soft: Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), section 2, with the factor T^2 that keeps the
            gradient's size;
        hard: Touvron et al. 2021 (DeiT, arXiv 2012.12877), eq. 3, here with any weight instead of 1/2.
    """
    logits = logits.float()
    loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    if teacher_logits is None or distillation == "none":
        return loss
    teacher_logits = teacher_logits.float()
    taught = logits if taught_logits is None else taught_logits.float()
    if distillation == "hard":
        top = teacher_logits.argmax(dim=1)
        teacher_loss = functional.cross_entropy(taught, top, label_smoothing=teacher_label_smoothing, reduction="none")
    else:
        student = torch.log_softmax(taught / temperature, dim=1)
        teacher = torch.log_softmax(teacher_logits / temperature, dim=1)
        divergence = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
        teacher_loss = temperature**2 * divergence
    return (1 - weight) * loss + weight * teacher_loss


def label_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    *,
    label_smoothing: float,
    weight: float,
    temperature: float,
    taught_logits: Tensor | None = None,
) -> Tensor:
    """Compute the loss of each sample in fp32, where each class is there or not, independently of the others.

    Args:
        logits: Logits of the student, of shape (B, C).
        targets: Zeros and ones, or what mixup makes of them, of shape (B, C).
        teacher_logits: Logits of the teacher, of shape (B, C); without them the loss is the binary cross-entropy.
        label_smoothing: Share by which each target moves towards 1/2.
        weight: Weight of the teacher's loss, from 0 to 1.
        temperature: Divides the logits of teacher and student.
        taught_logits: See `training_loss`.

    Returns:
        Losses of shape (B,), means over the classes.

    Source:
        Label smoothing: `BinaryCrossEntropy` of timm with `smooth_dense`. Teacher: Yang et al., Multi-label knowledge
        distillation, ICCV 2023 (arXiv 2308.06453), section 3.2: soft distillation of each class as a classification
        of its own, here with the factor T^2 of Hinton et al. 2015.
    """
    logits = logits.float()
    smooth = targets.float() * (1 - label_smoothing) + label_smoothing / 2
    loss = functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(dim=1)
    if teacher_logits is None:
        return loss
    taught = logits if taught_logits is None else taught_logits.float()
    divergence = label_divergence(teacher_logits.float() / temperature, taught / temperature)
    return (1 - weight) * loss + weight * temperature**2 * divergence / logits.shape[1]


def distillation_heads(
    model: nn.Module, recipe: FinetuneRecipe, *, has_teacher: bool
) -> AbstractContextManager[HeadLogits | None]:
    """Return the context of `two_heads` if the recipe trains the distillation token, else an empty context.

    Raises:
        RecipeError: There is no teacher, or the model has no distillation token.
    """
    if recipe.distillation_head == "logits":
        return nullcontext()
    if not has_teacher:
        raise RecipeError("finetune.distillation_head token needs a teacher: set finetune.teacher, or logits")
    return two_heads(model)


@contextmanager
def two_heads(model: nn.Module) -> Iterator[HeadLogits]:
    """Record, inside the block, the outputs of the two heads of a model with a distillation token.

    Yields:
        A function that returns the logits of the class token and of the distillation token, (B, C) each, of the last
        forward pass.

    Raises:
        RecipeError: The model has no distillation token.
    """
    network = getattr(model, "model", model)
    names = next((pair for pair in _HEADS if all(hasattr(network, name) for name in pair)), None)
    if names is None:
        raise RecipeError(
            f"finetune.distillation_head token: {type(network).__name__} has no distillation token; set it to logits"
        )
    last: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: last.update({name: output})

    hooks = [getattr(network, name).register_forward_hook(record(name)) for name in names]
    try:
        yield lambda: (last[names[0]], last[names[1]])
    finally:
        for hook in hooks:
            hook.remove()
