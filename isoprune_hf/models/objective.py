"""The loss of a model that a caller holds: `Objective`, with the losses that torch defines in `LOSSES`."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isoprune_hf.models.divergence import DIVERGENCES, Divergence, class_divergence


class Objective(Protocol):
    """The loss that scores and repairs are computed for.

    Attributes:
        name: Its name in the result.
        divergence: How two models are compared: by the probabilities of their outputs; None for the squares of their
            differences.
        reads_labels: The targets are those of the data. Without them a network is trained by a teacher alone.
    """

    @property
    def name(self) -> str: ...

    @property
    def divergence(self) -> Divergence | None: ...

    @property
    def reads_labels(self) -> bool: ...

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs by which two models are compared: (B, N)."""

    def summed_loss(self, outputs: Sequence[Tensor], targets: Tensor, inputs: Tensor) -> Tensor:
        """Return the loss summed over samples: a scalar.

        Args:
            outputs: All tensors that the model returns.
            targets: One entry for each sample, (B, ...).
            inputs: What the model was given, (B, ...).
        """

    def distances(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return how far the outputs are from those of a teacher, for each sample: (B,) in float32."""


def squared_distances(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared distance of two outputs (B, N) for each sample, (B,) in float32.

    Source:
        The limit of soft distillation at a high temperature, Hinton et al. 2015, arXiv 1503.02531, eq. 4.
    """
    difference: Tensor = found.float() - wanted.float()
    return difference.square().sum(1)


def side_by_side(outputs: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """Return some of the outputs, each with one entry for each sample, as one tensor (B, N)."""
    return torch.cat([outputs[number].reshape(len(outputs[number]), -1) for number in numbers], 1)


class TargetLoss:
    """A loss of one output and one tensor of targets.

    Args:
        name: A name of `LOSSES`.
        output: Number of the output.
        has_logits: The output is logits (B, N), of classes or of labels by the loss, so that it has probabilities.
    """

    reads_labels = True

    def __init__(self, name: str, output: int = 0, *, has_logits: bool = False):
        self.name = name
        self.divergence = DIVERGENCES[name] if has_logits else None
        self._output = output
        self._loss = LOSSES[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> "TargetLoss":
        return self  # a value: copies of a model share it

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the output as (B, N)."""
        found = outputs[self._output]
        return found if found.ndim == 2 else found.reshape(len(found), -1)

    def summed_loss(self, outputs: Sequence[Tensor], targets: Tensor, inputs: Tensor) -> Tensor:
        """Return the loss summed over samples."""
        return self._loss(outputs[self._output], targets)

    def distances(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return the squared distances of the output, (B,)."""
        return squared_distances(self.logits(outputs), self.logits(wanted))


class OutputNorm:
    """The sum of squared outputs: a loss that needs no targets, for random or unlabelled data.

    Args:
        logits: Returns the outputs as (B, N).
    """

    name = "squared outputs"
    divergence = None
    reads_labels = False

    def __init__(self, logits: Callable[[Sequence[Tensor]], Tensor]):
        self._logits = logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "OutputNorm":
        return self

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs as (B, N)."""
        return self._logits(outputs)

    def summed_loss(self, outputs: Sequence[Tensor], targets: Tensor, inputs: Tensor) -> Tensor:
        """Return the sum of the squared outputs."""
        return self.logits(outputs).square().sum()

    def distances(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return the squared distances of the outputs, (B,)."""
        return squared_distances(self.logits(outputs), self.logits(wanted))


def chooses_class(objective: Objective) -> bool:
    """Return whether outputs are logits of classes (B, classes), of which one is chosen for each sample."""
    return objective.divergence is class_divergence


def as_classes(target: Tensor) -> Tensor:
    """Return targets of the cross-entropy in a type that torch takes: whole numbers as int64."""
    return target if target.is_floating_point() else target.long()


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, as_classes(target), reduction="sum")


def _binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    wanted = target.to(output.dtype).view_as(output)
    return nn.functional.binary_cross_entropy_with_logits(output, wanted, reduction="sum")


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    difference: Tensor = output - target.to(output.dtype).view_as(output)
    return difference.square().sum()


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "cross_entropy": _cross_entropy,
        "binary_cross_entropy": _binary_cross_entropy,
        "squared_error": _squared_error,
    }
)
