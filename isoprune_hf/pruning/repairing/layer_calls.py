"""Find the layers of a network that can be fitted (`find_layers`), and observe their calls (`observe_calls`)."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.calibration.inputs import first_tensor, read_tensor
from isoprune_hf.pruning.graph.layers import BatchNorm, ConvNd
from isoprune_hf.pruning.repairing.normal_equations import FittedModule
from isoprune_hf.pruning.repairing.residual_stream import ResidualProbe
from isoprune_hf.pruning.repairing.waypoints import PassStopped


class FittedLayer(NamedTuple):
    """A layer to fit.

    Args:
        name: Its path, the same in both networks.
        module: The layer in the cut network.
        calls: Number of its calls in a forward pass.
        kept: Indices of the dense layer's outputs that were kept; None if none was removed.
        factor: Factors for the dense outputs: one number for each that was kept.
        norm: The BatchNorm after a layer without a bias.
        is_added: Its output is added to another tensor, as that of a residual branch.
    """

    name: str
    module: FittedModule
    calls: int
    kept: torch.Tensor | None
    factor: torch.Tensor | None
    norm: nn.Module | None
    is_added: bool


class LayerCall(NamedTuple):
    """One call of a layer.

    Args:
        inputs: Its input.
        output: Its output.
        stream: The tensor that the output is added to, in the layout and scale of the output.
    """

    inputs: torch.Tensor
    output: torch.Tensor
    stream: torch.Tensor | None = None


def find_layers(
    pruned: IsoPruneForImageClassification,
    masks: Mapping[tuple[str, int], np.ndarray],
    factors: Mapping[str, torch.Tensor],
) -> tuple[list[FittedLayer], list[str]]:
    """Find the layers to fit in the order of execution, and the names of layers of types that cannot be fitted.

    Args:
        pruned: The cut network.
        masks: (parameter, dim) -> which of its elements were kept.
        factors: Weight -> factors for the dense outputs.
    """
    blank = torch.zeros(1, *image_size_of(pruned), device=pruned.device)
    calls, norms = _count_calls(pruned, blank)
    layers = []
    unsupported = []
    for name, count in calls.items():
        module = pruned.model.get_submodule(name)
        weight = f"{name}.weight"
        mask = masks.get((weight, 0))
        if isinstance(module, nn.LayerNorm) and (mask is None or not module.elementwise_affine):
            continue  # all its channels were kept
        if not _can_be_fitted(module):
            unsupported.append(name)
            continue
        kept = None if mask is None else torch.from_numpy(np.flatnonzero(mask)).to(pruned.device)
        norm = norms.get(name) if module.bias is None else None
        layer = FittedLayer(name, module, count, kept, factors.get(weight), norm, count == 1)
        if layer.is_added and observe_calls(pruned, layer, blank)[0].stream is None:
            layer = layer._replace(is_added=False)
        layers.append(layer)
    return layers, unsupported


def observe_calls(model: IsoPruneForImageClassification, layer: FittedLayer, images: torch.Tensor) -> list[LayerCall]:
    """Run a forward pass and return all calls of a layer; the pass stops after the last one, or after its sum."""
    calls: list[LayerCall] = []

    def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: torch.Tensor) -> None:
        calls.append(LayerCall(read_tensor(args, kwargs), output.clone() if layer.is_added else output))
        if layer.is_added:
            probe.follow(output)
        elif len(calls) == layer.calls:
            raise PassStopped

    def on_sum(other: torch.Tensor) -> None:
        calls[0] = calls[0]._replace(stream=other)
        raise PassStopped

    probe = ResidualProbe(on_sum)
    handle = model.model.get_submodule(layer.name).register_forward_hook(on_call, with_kwargs=True)
    try:
        with probe if layer.is_added else nullcontext():
            model(pixel_values=images)
    except PassStopped:
        pass
    finally:
        handle.remove()
    return calls


def _count_calls(
    pruned: IsoPruneForImageClassification, images: torch.Tensor
) -> tuple[dict[str, int], dict[str, nn.Module]]:
    """Run a forward pass and return layer -> number of calls, in order, and layer -> the BatchNorm that reads it."""
    calls: dict[str, int] = {}
    # Outputs by id. The tensors are kept, too, so that no other tensor gets the id of one of them.
    written: dict[int, tuple[torch.Tensor, str]] = {}
    norms: dict[str, nn.Module] = {}

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        written[id(output)] = output, name

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if id(x) in written:
            norms[written[id(x)][1]] = module

    handles = []
    for name, module in pruned.model.named_modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        elif isinstance(module, (nn.Linear, ConvNd, nn.LayerNorm)):
            handles.append(module.register_forward_hook(partial(after, name)))
    try:
        pruned(pixel_values=images)
    finally:
        for handle in handles:
            handle.remove()
    return calls, norms


def _can_be_fitted(module: nn.Module) -> TypeGuard[FittedModule]:
    """Check whether a layer is a LayerNorm, or computes exactly what a linear or a 2d convolution computes."""
    if isinstance(module, nn.LayerNorm):
        return True
    is_layer = isinstance(module, (nn.Linear, nn.Conv2d))
    return is_layer and type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
