"""The distance between the answers of two networks to the same images."""

import torch


def divergence_of(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Compute the Kullback-Leibler divergence, for each image, of the probabilities of logits.

    Args:
        wanted: Logits of the network that is compared with (B, classes).
        found: Those of the other network.
    """
    target = wanted.log_softmax(-1)
    return (target.exp() * (target - found.log_softmax(-1))).sum(-1)
