"""The distance between the answers of two networks to the same images, by the probabilities of their logits."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

# From the logits of the network that is compared with and those of the other one, (B, N) each, to nats, (B,).
Divergence: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def class_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence, for each image, of the probabilities of classes.

    Args:
        wanted: Logits of the network that is compared with (B, classes).
        found: Those of the other network.
    """
    target = wanted.log_softmax(-1)
    return (target.exp() * (target - found.log_softmax(-1))).sum(-1)


def label_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Compute the sum over labels, for each image, of the Kullback-Leibler divergences of their probabilities.

    Each label is there or not, independently of the others, with the divergence
    p log(p / q) + (1 - p) log((1 - p) / (1 - q)).

    Args:
        wanted: Logits of the network that is compared with (B, labels).
        found: Those of the other network.

    Source:
        Yang et al., Multi-label knowledge distillation, ICCV 2023 (arXiv 2308.06453), section 3.2.
    """
    is_there = torch.sigmoid(wanted) * (functional.logsigmoid(wanted) - functional.logsigmoid(found))
    is_not = torch.sigmoid(-wanted) * (functional.logsigmoid(-wanted) - functional.logsigmoid(-found))
    return (is_there + is_not).sum(-1)


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {"cross_entropy": class_divergence, "binary_cross_entropy": label_divergence}
)  # by the loss of the outputs
