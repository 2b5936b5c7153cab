"""The loss of a network that gives boxes and logits of their classes: `DetectionLoss`, without labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Size, Tensor, nn

from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.extras import require_package
from isoprune_hf.models.seeded import generator_of

_SHARE = 0.1  # of its sides, by which a box is wrong as much as by 1 standard deviation
_SHORTEST = 0.05  # sides of boxes for that, at least, as a share of those of the image
_WORST = 1e9  # divergence of a pair that is not finite
_SIDES = 4  # numbers of a box
_CELLS = 8  # rows and columns of the places by which two networks are compared


class Found(NamedTuple):
    """The objects that a network finds.

    Args:
        log_yes: Logarithms of the probabilities of the classes, (B, Q, C); with a last one for no object if they are
            those of one choice.
        log_no: Logarithms of the probabilities that a class is not there, (B, Q, C); None for one choice.
        boxes: Centres and sizes of boxes as shares of the image, (B, Q, 4).
    """

    log_yes: Tensor
    log_no: Tensor | None
    boxes: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Return the probabilities of the classes of objects, (B, Q, C)."""
        return (self.log_yes if self.log_no is not None else self.log_yes[..., :-1]).exp()

    @property
    def objects(self) -> Tensor:
        """Return the probability that a query has found an object, (B, Q): of independent classes the largest one."""
        return self.probabilities.amax(2) if self.log_no is not None else -torch.expm1(self.log_yes[..., -1])


@dataclass(frozen=True)
class DetectionLoss:
    """The error of the classes and boxes of objects, for objects that the network itself draws.

    The Kullback-Leibler divergence from the dense network has the gradient 0 at the dense network itself. What a cut
    changes there is half of its second derivative, the Fisher information, as in `PixelClassLoss`: the expected square
    of the gradient of the cross-entropy with classes that are drawn for each query by its own probabilities. A network
    with a logit for no object (DETR, YOLOS) chooses one class for a query; otherwise each class has a probability of
    its own (RT-DETR, Deformable DETR). A box counts as the mean of a normal distribution whose standard deviation is a
    tenth of its sides, as much as the query has found an object: random signs give its Fisher information. The loss of
    an image is the sum over its queries divided by the square root of their number.

    Args:
        classes: Number of classes of objects.

    Source:
        Martens, New insights and perspectives on the natural gradient method, JMLR 2020, section 5.
    """

    classes: int
    name = "objects drawn for queries"
    divergence = None
    reads_labels = False

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs by which two networks are compared, (B, N), whatever the order of their queries.

        They are the numbers of objects of each class around 8 x 8 places of the image, and the sum of their sizes.
        """
        found = self.found(outputs)
        places = (torch.arange(_CELLS, dtype=found.boxes.dtype, device=found.boxes.device) + 0.5) / _CELLS
        across, down = (
            torch.exp(-((found.boxes[..., dim, None] - places) * _CELLS).square() / 2) for dim in (0, 1)
        )  # (B, Q, 8)
        near = (down[..., :, None] * across[..., None, :]).flatten(2)
        sizes = found.boxes[..., 2:] * found.objects[..., None]
        return (torch.cat([found.probabilities, sizes], 2).mT @ near).flatten(1)

    def summed_loss(self, outputs: Sequence[Tensor], targets: Tensor, inputs: Tensor) -> Tensor:
        """Return the cross-entropies with drawn classes and the signed sums of boxes, summed over images.

        Args:
            outputs: Logits (B, Q, C), and centres and sizes of boxes, (B, Q, 4).
            targets: Uniform random numbers, (B, N), of `draw_targets`.
            inputs: Images; not used.
        """
        found = self.found(outputs)
        queries = found.boxes.shape[1]
        numbers = targets.to(found.boxes).reshape(len(targets), queries, -1)
        drawn, signs = numbers[..., :-_SIDES], (numbers[..., -_SIDES:] < 0.5).to(found.boxes) * 2 - 1
        if found.log_no is None:
            limits = found.log_yes.detach().exp().cumsum(2)
            classes = (limits < drawn).sum(2, keepdim=True).clamp(max=limits.shape[2] - 1)
            entropy = -found.log_yes.gather(2, classes)
        else:
            entropy = -torch.where(drawn < found.log_yes.detach().exp(), found.log_yes, found.log_no)
        weights = found.objects.detach().sqrt()[..., None] / _deviations(found.boxes.detach())
        return (entropy.sum() + (weights * signs * found.boxes).sum()) / math.sqrt(queries)

    def distances(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return the mean divergence from the wanted objects, (B,) in nats, whatever the order of the queries.

        Queries are matched one to one so that the sum of the divergences of the pairs is the smallest. The divergence
        of a pair is that of its classes and, as likely as the wanted one is an object, of its boxes; beyond one
        standard deviation the latter grows linearly, as the loss of DETR does.

        Source:
            Carion et al., End-to-end object detection with transformers, ECCV 2020, equation 1, for the matching.
            The squares of differences below one deviation: the divergence of two normal distributions of the same
            variance; sqrt(1 + x^2) - 1 instead of x^2 / 2 as in Charbonnier et al., 1994.
        """
        queries = wanted[0].shape[1]  # in train mode LW-DETR and RF-DETR have more, in groups that eval mode has not
        found, target = self.found([value[:, :queries] for value in outputs[:2]]), self.found(wanted)
        likely = target.log_yes.exp()
        costs = (likely * target.log_yes).sum(2)[..., None] - likely @ found.log_yes.mT  # (B, wanted, found)
        if found.log_no is not None and target.log_no is not None:
            unlikely = target.log_no.exp()
            costs = costs + (unlikely * target.log_no).sum(2)[..., None] - unlikely @ found.log_no.mT
        for dim in range(_SIDES):
            off = target.boxes[..., dim, None] - found.boxes[..., dim][:, None]
            off = off / _deviations(target.boxes)[..., dim, None]
            costs = costs + target.objects[..., None] * ((1 + off.square()).sqrt() - 1)
        return costs.gather(2, _matched(costs)).mean((1, 2))

    def draw_targets(self, images: Tensor, shapes: Sequence[Size]) -> Tensor:
        """Return uniform random numbers for the classes and the four sides of each query, (B, N).

        Raises:
            UnsupportedArchitectureError: The boxes are other shapes than rectangles.
        """
        queries, logits = shapes[0]
        if shapes[1][-1] != _SIDES:
            raise UnsupportedArchitectureError(
                f"the network gives boxes of {shapes[1][-1]} numbers; a detector is pruned if each box has {_SIDES}, "
                "its centre, width and height"
            )
        count = queries * ((1 if logits > self.classes else logits) + _SIDES)
        return torch.stack([torch.rand(count, generator=generator_of(image)) for image in images])

    def found(self, outputs: Sequence[Tensor]) -> Found:
        """Return the objects in the outputs: logits (B, Q, C), and centres and sizes of boxes, (B, Q, 4)."""
        logits, boxes = outputs[0].float(), outputs[1].float()
        if logits.shape[2] > self.classes:
            return Found(logits.log_softmax(2), None, boxes)
        return Found(nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits), boxes)


def _matched(costs: Tensor) -> Tensor:
    """Return for each row the column that it is matched with, one to one at the smallest sum of costs: (B, N, 1)."""
    tables = costs.detach().nan_to_num(nan=_WORST, posinf=_WORST).cpu().double().numpy()
    optimize = require_package("scipy.optimize", "the comparison of detectors")
    columns = [optimize.linear_sum_assignment(table)[1] for table in tables]
    return torch.from_numpy(np.stack(columns)).to(costs.device)[..., None]


def _deviations(boxes: Tensor) -> Tensor:
    """Return the standard deviations of centres and sizes of boxes, (B, Q, 4)."""
    return boxes[..., 2:].clamp(min=_SHORTEST).repeat(1, 1, 2) * _SHARE
