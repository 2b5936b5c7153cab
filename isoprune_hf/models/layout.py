"""Run convolutional networks on a CPU in the layout that its convolutions compute in: `in_fast_layout`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_MIN_CONVOLUTIONS = 2  # a transformer has one, which makes its patches, and gains nothing
_MAX_DIFFERENCE = 1e-3  # of the logits, as a fraction of the largest


@contextmanager
def in_fast_layout(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Keep the weights of 2-d convolutions in NHWC (channels_last) within the context, for a network on a CPU.

    The first convolution turns its images into this layout, and all layers after it keep it: a pass of a convolutional
    network takes two thirds to four fifths of the time. The weights are restored afterwards. A network stays as it is
    if it fails in NHWC, as one does that views feature maps as rows, or if it answers differently.

    Args:
        model: The network in eval mode; it takes `pixel_values` and returns `.logits`. Its weights must not be
            changed within the context.
        images: Images (B, C, H, W) that it takes; the first one is tried.
    """
    weights = _convolution_weights(model)
    if len(weights) < _MIN_CONVOLUTIONS:
        yield
        return
    with torch.no_grad():
        expected = model(pixel_values=images[:1]).logits
    stored = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        if not _answers(model, images[:1], expected):
            _restore(weights, stored)
        yield
    finally:
        _restore(weights, stored)


def _convolution_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the 2-d convolutions that are on the CPU, each once."""
    found = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and isinstance(module.weight, nn.Parameter) and module.weight.is_cpu
    }
    return list(found.values())


def _answers(model: nn.Module, images: Tensor, expected: Tensor) -> bool:
    """Return whether a network still gives the expected logits, up to rounding."""
    try:
        with torch.no_grad():
            found = model(pixel_values=images).logits
    except RuntimeError:
        return False
    return bool((found - expected).abs().max() <= _MAX_DIFFERENCE * expected.abs().max())


def _restore(weights: list[nn.Parameter], stored: list[Tensor]) -> None:
    for weight, first in zip(weights, stored, strict=True):
        weight.data = first
