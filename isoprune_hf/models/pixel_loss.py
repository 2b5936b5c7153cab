"""The loss of a network that gives logits of classes for pixels: `PixelClassLoss`, without labels."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from isoprune_hf.models.seeded import generator_of

_SCORED = 64  # rows and columns of pixels at most that an image is scored at
_COMPARED = 8  # rows and columns of pixels at most by which two networks are compared


class PixelClassLoss:
    """The error of the classes of pixels, for classes that the network itself draws.

    The Kullback-Leibler divergence from the dense network has the gradient 0 at the dense network itself. What a cut
    changes there is half of its second derivative, the Fisher information: the expected square of the gradient of the
    cross-entropy, where the class of each pixel is drawn by the network's own probabilities. The draw is the inverse
    of their cumulative sum at a uniform random number, of which each pixel has its own in the targets. The loss of an
    image is the sum over its pixels divided by the square root of their number, so that its mean square is the mean
    Fisher information of a pixel. Large maps are scored at every second, third, ... pixel.

    Source:
        Martens, New insights and perspectives on the natural gradient method, JMLR 2020, section 5: the Fisher
        information of the model's own distribution, with classes drawn from it. The products of gradients of two
        pixels have the mean 0, as their classes are independent.
    """

    name = "classes drawn for pixels"
    divergence = None
    reads_labels = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "PixelClassLoss":
        return self  # a value: copies of a model share it

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs by which two networks are compared, (B, N), at 8 x 8 pixels at most.

        They are the square roots of the probabilities less those of equal probabilities: half of the squared distance
        of two of them is the squared Hellinger distance, which near 0 is a quarter of the divergence.
        """
        found = _log_probabilities(_at_some_pixels(outputs[0], _COMPARED))
        return ((found / 2).exp() - math.sqrt(1 / found.shape[1])).flatten(1)

    def summed_loss(self, outputs: Sequence[Tensor], targets: Tensor, inputs: Tensor) -> Tensor:
        """Return the cross-entropies with drawn classes, summed over images.

        Args:
            outputs: Logits of classes first, (B, C, H, W).
            targets: Uniform random numbers of the pixels, (B, P), of `draw_targets`.
            inputs: Images; not used.
        """
        found = _log_probabilities(_at_some_pixels(outputs[0], _SCORED))
        pixels = found.shape[2]
        limits = found.detach().exp().cumsum(1)
        drawn = (limits < targets.to(limits)[:, None]).sum(1, keepdim=True).clamp(max=found.shape[1] - 1)
        return -found.gather(1, drawn).sum() / math.sqrt(pixels)

    def distances(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return the mean divergence of a pixel's probabilities from the wanted ones, (B,) in nats."""
        found, target = (_log_probabilities(part[0].flatten(2)) for part in (outputs, wanted))
        return nn.functional.kl_div(found, target, reduction="none", log_target=True).sum(1).mean(1)

    def draw_targets(self, images: Tensor, shapes: Sequence[Size]) -> Tensor:
        """Return uniform random numbers, (B, P), for P pixels of the first output, see `DrawnObjective`."""
        _, height, width = shapes[0]
        count = len(range(height)[_some(height, _SCORED)]) * len(range(width)[_some(width, _SCORED)])
        return torch.stack([torch.rand(count, generator=generator_of(image)) for image in images])


def classes_of_pixels(logits: Tensor) -> Tensor:
    """Return the class of each pixel, (B, H, W), of logits (B, C, H, W); a single one is that of the second of two."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


def _at_some_pixels(logits: Tensor, side: int) -> Tensor:
    """Return logits (B, C, H, W) at evenly spaced pixels, (B, C, P), of so many rows and columns at most."""
    return logits[:, :, _some(logits.shape[2], side), _some(logits.shape[3], side)].flatten(2)


def _some(size: int, side: int) -> slice:
    """Return at most `side` evenly spaced indices of `size`."""
    stride = math.ceil(size / side)
    return slice(stride // 2, None, stride)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithms of probabilities, (B, C, P); a single logit is that of the second of two classes."""
    values = logits.float()
    if values.shape[1] == 1:
        values = torch.cat([torch.zeros_like(values), values], 1)
    return values.log_softmax(1)


PIXEL_CLASSES = PixelClassLoss()
