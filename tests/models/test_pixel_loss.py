"""The loss of pixels: over the drawn classes, its mean squared gradient is the Fisher information of a pixel."""

import copy
import itertools
import math

import torch

from isoprune_hf.models.pixel_loss import PIXEL_CLASSES, classes_of_pixels


def test_mean_square_over_classes_is_fisher() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.5, -1.0], [2.0, 0.3]]).reshape(1, 3, 1, 2)  # three classes of two pixels
    slopes = torch.tensor([[1.0, 0.5], [-2.0, 3.0], [0.7, 0.1]]).reshape(1, 3, 1, 2)  # of each logit by the gate
    shares = logits.softmax(1)
    limits = shares.cumsum(1)
    mean = torch.zeros(())
    for drawn in itertools.product(range(3), repeat=2):
        at = torch.tensor(drawn)
        gate = torch.ones((), requires_grad=True)
        middle = torch.stack([limits[0, at[p], 0, p] - shares[0, at[p], 0, p] / 2 for p in range(2)])[None]
        loss = PIXEL_CLASSES.summed_loss([logits + slopes * (gate - 1)], middle, logits)
        (gradient,) = torch.autograd.grad(loss, gate)
        mean = mean + shares[0, at[0], 0, 0] * shares[0, at[1], 0, 1] * gradient**2
    # Of each pixel the variance of the slopes under its probabilities; the mean over the two pixels.
    variance = (shares * slopes**2).sum(1) - (shares * slopes).sum(1) ** 2
    torch.testing.assert_close(mean, variance.mean())


def test_random_numbers_depend_on_the_pixels_alone() -> None:
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    shapes = [torch.Size((2, 100, 30))]  # every second row of the map, and all columns
    drawn = PIXEL_CLASSES.draw_targets(images, shapes)
    assert drawn.shape == (3, 50 * 30) and drawn.min() >= 0 and drawn.max() < 1
    assert torch.equal(PIXEL_CLASSES.draw_targets(images[1:], shapes), drawn[1:])
    assert PIXEL_CLASSES.summed_loss([torch.zeros(3, 2, 100, 30)], drawn, images) > 0


def test_drawn_classes_have_the_probabilities() -> None:
    count = 40 * 40
    logits = torch.tensor([0.1, 0.6, 0.3]).log().reshape(1, 3, 1, 1).expand(1, 3, 40, 40)
    drawn = PIXEL_CLASSES.draw_targets(torch.zeros(1, 3, 2, 2), [torch.Size((3, 40, 40))])
    loss = PIXEL_CLASSES.summed_loss([logits], drawn, logits) / math.sqrt(count)
    entropy = -sum(share * math.log(share) for share in (0.1, 0.6, 0.3))
    assert abs(float(loss) - entropy) < 0.05


def test_networks_are_compared_by_hellinger_distance() -> None:
    first, second = torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5])
    outputs = [share.log().reshape(1, 2, 1, 1) for share in (first, second)]
    compared = [PIXEL_CLASSES.logits([value]) for value in outputs]
    wanted = 1 - float((first * second).sqrt().sum())  # the squared Hellinger distance
    torch.testing.assert_close((compared[0] - compared[1]).square().sum() / 2, torch.tensor(wanted))
    assert torch.equal(compared[1], torch.zeros(1, 2))  # that of equal probabilities
    assert PIXEL_CLASSES.logits([torch.zeros(2, 3, 30, 30)]).shape == (2, 3 * 7 * 7)  # every fourth


def test_distance_is_mean_divergence_of_pixels() -> None:
    wanted = torch.tensor([[0.5, 0.9], [0.5, 0.1]]).log().reshape(1, 2, 1, 2)
    found = torch.tensor([[0.25, 0.9], [0.75, 0.1]]).log().reshape(1, 2, 1, 2)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(PIXEL_CLASSES.distances([found], [wanted]), torch.tensor([divergence / 2]))


def test_single_logit_is_that_of_second_class() -> None:
    single = torch.tensor([[[[-1.0, 2.0]]]])
    both = torch.cat([torch.zeros_like(single), single], 1)
    assert torch.equal(classes_of_pixels(single), classes_of_pixels(both))
    assert torch.equal(PIXEL_CLASSES.logits([single]), PIXEL_CLASSES.logits([both]))
    assert copy.deepcopy(PIXEL_CLASSES) is PIXEL_CLASSES
