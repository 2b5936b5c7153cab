"""Fold BatchNorm into the convolutions before it: `fold_batchnorm`."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# BatchNorm1d to BatchNorm3d, and classes of timm that apply an activation after it; private in torch 2.14.
_BatchNorm = nn.modules.batchnorm._BatchNorm
_MAX_DIFFERENCE = 1e-3  # of the logits, as a fraction of the largest


def fold_batchnorm(model: nn.Module, images: torch.Tensor) -> tuple[nn.Module, str | None]:
    """Return a copy in eval mode in which BatchNorm that directly follows a convolution is part of its weights.

    Pairs are found in one pass: the output of the convolution is the input of the norm, and both run once. The copy is
    kept only if it answers as the model does, since another use of that output does not show in the pass.

    Args:
        model: The model; it is not changed.
        images: Images (B, C, H, W) that it takes.

    Returns:
        The copy, and why nothing was folded; None if all pairs were.
    """
    folded = copy.deepcopy(model).eval()
    with torch.no_grad():
        pairs, expected = _find_pairs(folded, images)
        for conv, norm in pairs.items():
            _fold(folded, conv, norm)
        found = _logits(folded(images))
    largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((found - expected).abs().max() / largest)
    if difference <= _MAX_DIFFERENCE:
        return folded, None
    return copy.deepcopy(model).eval(), f"BatchNorm is not folded, which would change the answers by {difference:.0%}"


def _find_pairs(model: nn.Module, images: torch.Tensor) -> tuple[Mapping[str, str], torch.Tensor]:
    """Run a pass; return convolution -> norm after it, and the logits."""
    modules = dict(_layers(model))
    calls = dict.fromkeys(modules, 0)
    outputs: list[tuple[str, torch.Tensor]] = []  # kept alive, so that no other tensor takes their identity
    pairs: dict[str, str] = {}

    def record(name: str, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls[name] += 1
        if isinstance(modules[name], _BatchNorm):
            pairs.update({conv: name for conv, made in outputs if made is args[0]})
        else:
            outputs.append((name, output))

    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: record(name, args, output))
        for name, module in modules.items()
    ]
    try:
        logits = _logits(model(images))
    finally:
        for hook in hooks:
            hook.remove()
    return {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}, logits


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the convolutions, and the norms that have statistics."""
    for name, module in model.named_modules():
        has_statistics = isinstance(module, _BatchNorm) and module.running_mean is not None
        if has_statistics or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield name, module


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    """Change the weights of a convolution, and leave of the norm the modules inside it, such as an activation."""
    conv: Any = model.get_submodule(conv_name)
    norm: Any = model.get_submodule(norm_name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    model.set_submodule(norm_name, nn.Sequential(*norm.children()))


def _logits(output: Any) -> torch.Tensor:
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return logits.float()
