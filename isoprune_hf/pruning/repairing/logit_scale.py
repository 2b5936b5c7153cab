"""Scale the logits of a network around their mean by changing the layer that computes them (`scale_logits`)."""

from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.graph.layers import ConvNd

_TOLERANCE = 1e-4  # of the largest logit


def scale_logits(model: IsoPruneForImageClassification, scale: float, center: torch.Tensor) -> bool:
    """Multiply the distances of the logits from `center` (classes,), in weight and bias of their layer, in place.

    Returns:
        False if no layer with a bias computes the logits, or if those of an image do not change as they should;
        nothing is then changed.
    """
    if scale == 1:
        return True
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, *image_size_of(model), generator=generator).to(model.device)
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        logits, head = _find_head(model, images)
        if head is None:
            return False
        parameters = [head.weight, head.bias]
        before = [parameter.clone() for parameter in parameters]
        center = center.to(logits)
        head.weight.mul_(scale)
        head.bias.copy_(center + scale * (head.bias - center))
        wanted = center + scale * (logits - center)
        found = model(pixel_values=images).logits
        if torch.allclose(found, wanted, rtol=0, atol=_TOLERANCE * float(wanted.abs().max())):
            return True
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        return False


def _find_head(model: IsoPruneForImageClassification, images: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return the logits, and the linear or convolution with a bias whose output they are, or None."""
    outputs: list[tuple[torch.Tensor, nn.Module]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        outputs.append((output, module))

    layers = [
        module for module in model.modules() if isinstance(module, (nn.Linear, ConvNd)) and module.bias is not None
    ]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        logits = model(pixel_values=images).logits
    finally:
        for handle in handles:
            handle.remove()
    is_head = (module for output, module in outputs if output.data_ptr() == logits.data_ptr())
    return logits, next(is_head, None)
