"""The loss of boxes: its mean squared gradient is the Fisher information, its distances ignore the order."""

import itertools
import math

import pytest
import torch

from isoprune_hf.checkpoint.task_forms import OBJECT_DETECTION
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models.detection_loss import DetectionLoss
from isoprune_hf.models.drawn_targets import loss_without_labels

BOXES = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]])


def gradient_of(loss: DetectionLoss, logits: torch.Tensor, slopes: tuple[torch.Tensor, ...], numbers: list) -> float:
    """Return the gradient of the loss by a gate that moves logits and boxes along slopes."""
    gate = torch.ones((), requires_grad=True)
    moved = [value + slope * (gate - 1) for value, slope in zip((logits, BOXES), slopes, strict=True)]
    summed = loss.summed_loss(moved, torch.tensor([numbers]), torch.zeros(1))
    return float(torch.autograd.grad(summed, gate)[0])


def test_mean_square_is_fisher_of_one_choice() -> None:
    logits, slopes = torch.tensor([[[0.3, -0.5, 1.0]]]), torch.tensor([[[1.0, -2.0, 0.7]]])  # the last: no object
    moves = torch.tensor([[[0.01, -0.02, 0.03, 0.005]]])
    shares = logits.softmax(2)[0, 0].tolist()
    middles = [shares[0] / 2, shares[0] + shares[1] / 2, shares[0] + shares[1] + shares[2] / 2]
    mean = 0.0
    for drawn, signs in itertools.product(range(3), itertools.product((0.2, 0.8), repeat=4)):
        found = gradient_of(DetectionLoss(2), logits, (slopes, moves), [middles[drawn], *signs])
        mean += shares[drawn] / 16 * found**2
    steps = slopes[0, 0].tolist()
    average = sum(share * step for share, step in zip(shares, steps, strict=True))
    variance = sum(share * (step - average) ** 2 for share, step in zip(shares, steps, strict=True))
    deviations = (0.02, 0.04, 0.02, 0.04)  # a tenth of width and height
    of_box = sum((move / size) ** 2 for move, size in zip(moves[0, 0].tolist(), deviations, strict=True))
    assert math.isclose(mean, variance + (1 - shares[2]) * of_box, rel_tol=1e-4)


def test_mean_square_is_fisher_of_each_class() -> None:
    logits, slopes = torch.tensor([[[0.3, -0.5]]]), torch.tensor([[[1.0, -2.0]]])
    moves = torch.tensor([[[0.01, -0.02, 0.03, 0.005]]])
    shares = logits.sigmoid()[0, 0].tolist()
    mean = 0.0
    for first, second, *signs in itertools.product((0, 1), (0, 1), *[(0.2, 0.8)] * 4):
        numbers = [share / 2 if yes else (1 + share) / 2 for share, yes in zip(shares, (first, second), strict=True)]
        chance = math.prod(share if yes else 1 - share for share, yes in zip(shares, (first, second), strict=True))
        mean += chance / 16 * gradient_of(DetectionLoss(2), logits, (slopes, moves), [*numbers, *signs]) ** 2
    variance = sum(s * (1 - s) * step**2 for s, step in zip(shares, (1.0, -2.0), strict=True))
    of_box = sum((move / size) ** 2 for move, size in zip(moves[0, 0].tolist(), (0.02, 0.04) * 2, strict=True))
    assert math.isclose(mean, variance + max(shares) * of_box, rel_tol=1e-4)


def test_queries_of_other_groups_are_left_out() -> None:
    wanted = [torch.tensor([[[2.0, -1.0]]]), BOXES]
    wrong, right = torch.tensor([[[-2.0, 1.0]]]), wanted[0]
    alone = DetectionLoss(2).distances([wrong, BOXES], wanted)
    in_train_mode = [torch.cat([wrong, right], 1), BOXES.repeat(1, 2, 1)]  # LW-DETR has the second group there alone
    torch.testing.assert_close(DetectionLoss(2).distances(in_train_mode, wanted), alone)


def test_distance_of_one_query_by_hand() -> None:
    wanted = [torch.tensor([[0.75, 0.25]]).log()[None], BOXES]  # one class, and no object
    found = [torch.tensor([[0.5, 0.5]]).log()[None], BOXES + torch.tensor([0.06, 0.0, 0.0, 0.0])]
    classes = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    boxes = 0.75 * (math.sqrt(1 + 3**2) - 1)  # three deviations of 0.1 * 0.2
    torch.testing.assert_close(DetectionLoss(1).distances(found, wanted), torch.tensor([classes + boxes]))


def test_each_query_is_matched_with_one_other() -> None:
    logits = torch.tensor([[0.75, 0.25]]).log().expand(1, 2, 2)
    apart = torch.tensor([[[0.3, 0.5, 0.2, 0.4], [0.36, 0.5, 0.2, 0.4]]])  # by three deviations of 0.1 * 0.2
    found = [logits, apart[:, :1].expand(1, 2, 4)]  # twice the first one
    boxes = 0.75 * (math.sqrt(1 + 3**2) - 1)
    torch.testing.assert_close(DetectionLoss(1).distances(found, [logits, apart]), torch.tensor([boxes / 2]))


def test_distance_of_numbers_that_overflowed_is_not_finite() -> None:
    logits = torch.full((1, 2, 2), math.nan)
    boxes = BOXES.expand(1, 2, 4)
    assert DetectionLoss(1).distances([logits, boxes], [torch.zeros(1, 2, 2), boxes]).isnan().all()


def test_order_of_queries_makes_no_difference() -> None:
    random = torch.Generator().manual_seed(0)
    for logits in (torch.randn(2, 7, 3, generator=random), torch.randn(2, 7, 2, generator=random)):
        outputs = [logits, torch.rand(2, 7, 4, generator=random)]
        other = [value.flip(1) for value in outputs]
        loss = DetectionLoss(2)
        torch.testing.assert_close(loss.distances(other, outputs), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(loss.logits(other), loss.logits(outputs))
        moved = [logits, outputs[1] * 0.9]
        assert (loss.distances(moved, outputs) > 0.01).all()
        assert not torch.allclose(loss.logits(moved), loss.logits(outputs), atol=1e-3)


def test_random_numbers_fit_the_kind_of_logits() -> None:
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    loss = loss_without_labels(OBJECT_DETECTION, 5)
    for logits, count in ((6, 1), (5, 5)):
        shapes = [torch.Size((10, logits)), torch.Size((10, 4))]
        drawn = loss.draw_targets(images, shapes)
        assert drawn.shape == (3, 10 * (count + 4)) and torch.equal(loss.draw_targets(images[1:], shapes), drawn[1:])
        assert loss.summed_loss([torch.zeros(3, 10, logits), torch.full((3, 10, 4), 0.5)], drawn, images).isfinite()


def test_quadrilaterals_are_refused() -> None:
    """PP-DocLayoutV4 gives a centre and four corners."""
    with pytest.raises(UnsupportedArchitectureError, match="boxes of 10 numbers"):
        DetectionLoss(5).draw_targets(torch.zeros(1, 3, 4, 4), [torch.Size((12, 5)), torch.Size((12, 10))])
