"""Parameters that no loss reaches, such as mask tokens and auxiliary classifiers: `frozen_unreached`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.models.processors import processed_size
from isoprune_hf.pruning.calibration.pass_state import undoing_passes

_BATCH = 2  # statistics of a batch need two values for each channel


@contextmanager
def frozen_unreached(model: nn.Module, processor: BaseImageProcessor) -> Iterator[None]:
    """Freeze inside the block, in place, the parameters that the logits depend on neither in train nor in eval mode.

    They get no gradient, so training leaves them as they are in any case. Ranks that are wrapped inside the block do
    not wait for their gradients.
    """
    reached = _reached(model, processed_size("the student", processor))
    frozen = [each for each in model.parameters() if each.requires_grad and id(each) not in reached]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _reached(model: nn.Module, image_size: list[int]) -> set[int]:
    """Return the identities of the parameters that get a gradient in a pass in train or eval mode; changes nothing."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return set()
    device = parameters[0].device
    modes = [(module, module.training) for module in model.modules()]
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]  # BatchNorm writes without a new version
    found: set[int] = set()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        images = torch.rand(_BATCH, *image_size, device=device, dtype=parameters[0].dtype)
        try:
            for is_training in (True, False):
                model.train(is_training)
                with undoing_passes(model), torch.enable_grad():
                    total = model(pixel_values=images).logits.float().sum()
                    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
                pairs = zip(parameters, gradients, strict=True)
                found |= {id(parameter) for parameter, gradient in pairs if gradient is not None}
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in statistics:
                    buffer.copy_(value)
    return found
