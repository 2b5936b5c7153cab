import math

import pytest
import torch

from isoprune_hf.training.distillation import training_loss

LOGITS = torch.tensor([[math.log(3.0), 0.0]])  # softmax: 3/4, 1/4
TEACHER = torch.tensor([[0.0, math.log(4.0)]])  # softmax: 1/5, 4/5
LABELS = torch.tensor([0])


def loss_of(**changes: object) -> float:
    options = {"label_smoothing": 0.0, "distillation": "none", "weight": 0.5, "temperature": 1.0, **changes}
    return training_loss(LOGITS, LABELS, TEACHER, **options).item()


def test_without_a_teacher_it_is_the_cross_entropy():
    options = {"label_smoothing": 0.0, "weight": 0.5, "temperature": 1.0}
    assert training_loss(LOGITS, LABELS, None, distillation="soft", **options).item() == pytest.approx(
        -math.log(3 / 4)
    )
    assert loss_of(distillation="none") == pytest.approx(-math.log(3 / 4))


def test_label_smoothing_spreads_the_target_over_all_classes():
    # The target is 0.9 + 0.1 / 2 on the label, 0.1 / 2 on the other class.
    assert loss_of(label_smoothing=0.1) == pytest.approx(-0.95 * math.log(3 / 4) - 0.05 * math.log(1 / 4))


def test_soft_distillation_adds_the_divergence_from_the_teacher():
    divergence = 0.2 * math.log(0.2 / 0.75) + 0.8 * math.log(0.8 / 0.25)
    expected = 0.7 * -math.log(3 / 4) + 0.3 * divergence
    assert loss_of(distillation="soft", weight=0.3) == pytest.approx(expected, rel=1e-6)


def test_temperature_softens_both_and_scales_by_square():
    # At T = 2 the odds become their square roots: sqrt(3) : 1 and 1 : 2.
    student = (math.sqrt(3) / (1 + math.sqrt(3)), 1 / (1 + math.sqrt(3)))
    divergence = (1 / 3) * math.log((1 / 3) / student[0]) + (2 / 3) * math.log((2 / 3) / student[1])
    assert loss_of(distillation="soft", weight=1.0, temperature=2.0) == pytest.approx(4 * divergence, rel=1e-5)


def test_hard_distillation_uses_the_unsmoothed_top_class():
    smoothed = -0.95 * math.log(3 / 4) - 0.05 * math.log(1 / 4)
    expected = 0.5 * smoothed + 0.5 * -math.log(1 / 4)
    assert loss_of(distillation="hard", label_smoothing=0.1) == pytest.approx(expected)


def test_each_sample_has_its_own_loss_in_fp32():
    logits = torch.cat([LOGITS, LOGITS]).to(torch.bfloat16)
    options = {"label_smoothing": 0.0, "distillation": "hard", "weight": 0.5, "temperature": 1.0}
    losses = training_loss(logits, torch.tensor([0, 1]), torch.cat([TEACHER, TEACHER]), **options)
    assert losses.shape == (2,) and losses.dtype == torch.float32 and losses[0] < losses[1]


def test_gradient_is_zero_if_student_equals_teacher():
    logits = LOGITS.clone().requires_grad_()
    options = {"label_smoothing": 0.1, "distillation": "soft", "weight": 1.0, "temperature": 3.0}
    training_loss(logits, LABELS, LOGITS, **options).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(LOGITS), atol=1e-6, rtol=0)


def test_taught_logits_and_teacher_smoothing_change_the_loss():
    taught = torch.tensor([[0.0, math.log(9.0)]])  # softmax: 1/10, 9/10
    options = {"distillation": "hard", "taught_logits": taught}
    label = -math.log(3 / 4)
    assert loss_of(**options) == pytest.approx((label - math.log(9 / 10)) / 2)
    smoothed = -0.9 * math.log(9 / 10) - 0.1 * math.log(1 / 10)
    assert loss_of(**options, teacher_label_smoothing=0.2) == pytest.approx((label + smoothed) / 2)


def test_targets_may_be_shares_of_classes():
    targets = torch.tensor([[0.3, 0.7]])
    options = {"label_smoothing": 0.0, "distillation": "none", "weight": 0.5, "temperature": 1.0}
    expected = -0.3 * math.log(3 / 4) - 0.7 * math.log(1 / 4)
    assert training_loss(LOGITS, targets, None, **options).item() == pytest.approx(expected)
