"""The loss of a network that gives features and no classes: `FeatureLoss`, with its targets in `draw_signs`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from isoprune_hf.models.objective import squared_distances
from isoprune_hf.models.seeded import generator_of

_POSITIONS = 8  # of an output with positions, such as tokens or a map, by which two networks are compared


class FeatureLoss:
    """The error of features relative to those of the dense network, without labels.

    Any distance from the dense features has the gradient 0 at the dense network itself. What a cut changes there is
    the second derivative of half of the squared distance: the sum of the squared gradients of all features. It is the
    expected square of the gradient of one sum of the features with random signs, each output divided by its norm, and
    this sum is the loss. The signs of an image are the products of signs of the dims of each output, in its row of the
    targets, see `draw_signs`.

    Source:
        Gauss-Newton matrix of a squared error, estimated as by Hutchinson, A stochastic estimator of the trace of the
        influence matrix, 1989; products of independent signs have the mean 0 and the square 1, and are uncorrelated.
    """

    name = "features with random signs"
    divergence = None
    reads_labels = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureLoss":
        return self  # a value: copies of a model share it

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the features by which two networks are compared, (B, N): of many positions 8, with the first."""
        return torch.cat([_at_some_positions(value).reshape(len(value), -1) for value in outputs], 1)

    def summed_loss(self, outputs: Sequence[Tensor], targets: Tensor, inputs: Tensor) -> Tensor:
        """Return the signed sums of the outputs, summed over images.

        Args:
            outputs: Features, (B, C), (B, N, C) or (B, C, H, W).
            targets: Signs of the images, (B, S), of `draw_signs`.
            inputs: Images; not used.
        """
        total = torch.zeros((), dtype=outputs[0].dtype, device=outputs[0].device)
        rest = targets.to(outputs[0].dtype)
        for value in outputs:
            dims = tuple(range(1, value.ndim))
            signed = value
            for dim in dims:
                part, rest = rest[:, : value.shape[dim]], rest[:, value.shape[dim] :]
                signed = signed * part.reshape(len(value), *(-1 if other == dim else 1 for other in dims))
            norm = value.detach().square().sum(dims).clamp(min=torch.finfo(value.dtype).tiny).sqrt()
            total = total + (signed.sum(dims) / norm).sum()
        return total

    def distances(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return the squared distances of all outputs relative to the squared norms of the wanted ones, (B,).

        Args:
            outputs: Features, (B, C), (B, N, C) or (B, C, H, W).
            wanted: Those of the teacher, of the same shapes.
        """
        total = torch.zeros(len(outputs[0]), device=outputs[0].device)
        for value, other in zip(outputs, wanted, strict=True):
            found, target = value.float().flatten(1), other.float().flatten(1)
            norm = target.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
            total = total + squared_distances(found, target) / norm
        return total

    def draw_targets(self, images: Tensor, shapes: Sequence[Size]) -> Tensor:
        """Return the signs of images, see `draw_signs`."""
        return draw_signs(images, shapes)


def draw_signs(images: Tensor, shapes: Sequence[Size]) -> Tensor:
    """Return random signs for images, the same for the same pixels wherever they are in a batch or on which rank.

    Args:
        images: (B, C, H, W).
        shapes: Shapes of the outputs without the dim of the batch.

    Returns:
        1 and -1 in int8, (B, S), where S is the sum of all sizes in `shapes`.
    """
    count = sum(sum(shape) for shape in shapes)
    rows = [torch.randint(0, 2, (count,), generator=generator_of(image), dtype=torch.int8) for image in images]
    return torch.stack(rows) * 2 - 1


def _at_some_positions(value: Tensor) -> Tensor:
    """Return an output at a few positions, evenly spaced: of tokens (B, N, C) or of a map (B, C, H, W)."""
    if value.ndim == 3:
        return value[:, :: math.ceil(value.shape[1] / _POSITIONS)]
    if value.ndim == 4:
        flat = value.flatten(2)
        return flat[:, :, :: math.ceil(flat.shape[2] / _POSITIONS)]
    return value


FEATURES = FeatureLoss()
