"""The training loss: labels, and what the teacher adds."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def training_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    *,
    label_smoothing: float,
    distillation: Literal["none", "soft", "hard"],
    weight: float,
    temperature: float,
) -> Tensor:
    """Compute the loss of each sample in fp32.

    Args:
        logits: The student's, of shape (B, C).
        labels: Class indices of shape (B,).
        teacher_logits: The teacher's, of shape (B, C); without them the loss is the cross-entropy alone.
        label_smoothing: Share of the label's target that goes to all classes; the teacher's part is never smoothed.
        distillation: soft compares the two distributions, hard takes the teacher's top class as a second label.
        weight: Share of the teacher, from 0 to 1.
        temperature: Divides both logits of soft distillation; hard has none.

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
    if distillation == "hard":
        teacher_loss = functional.cross_entropy(logits, teacher_logits.argmax(dim=1), reduction="none")
    else:
        student = torch.log_softmax(logits / temperature, dim=1)
        teacher = torch.log_softmax(teacher_logits / temperature, dim=1)
        divergence = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
        teacher_loss = temperature**2 * divergence
    return (1 - weight) * loss + weight * teacher_loss
