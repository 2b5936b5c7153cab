"""Repairing a cut network without training: layer by layer it is fitted to what the dense one computes.

In the order of execution each linear, convolution and cut LayerNorm gets the weights that bring its outputs nearest to
the dense layer's, given what the layers before it (fitted already) now feed it. With x the inputs of all images and
positions, y the dense outputs of the channels that stay, and W the weights after the cut:

    W' = W + (sum (y - W x) x^T) (sum x x^T + D)^-1,    D = ridge x diag(sum x x^T) + a floor

The ridge holds W' near W and not near 0, so what the sample does not determine stays as it was cut. Where there are
few rows for the features, or a bias that is fitted to half of the images does better on the other half than weights,
as in a wide layer that saw few images, the bias alone is fitted; a layer without one stays. Labels are not used. He
et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, without the ridge.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Batches
from isoprune_hf.pruning.calibration.gradients import scoring_mode, sum_over_ranks
from isoprune_hf.pruning.graph.layers import BatchNorm, ConvNd
from isoprune_hf.pruning.repairing.least_squares import add_up, halves_of, holds_for_bias_alone, no_sums, solve
from isoprune_hf.pruning.repairing.residual_stream import Stream
from isoprune_hf.pruning.repairing.waypoints import Passes, Reached

_SAME = 1e-10  # of the energy of the outputs: a layer that already gives them is left as it is


class Layer(NamedTuple):
    """A layer to fit.

    Args:
        name: Its path, the same in both networks.
        calls: How often a forward pass calls it.
        kept: Its outputs that stay, of the dense layer; all where None.
        factor: What the dense outputs are multiplied with: one number for each that stays.
        norm: The BatchNorm behind a layer without a bias.
        is_added: Its output goes into a sum, as a residual branch's does.
    """

    name: str
    calls: int
    kept: torch.Tensor | None
    factor: torch.Tensor | None
    norm: nn.Module | None
    is_added: bool


class Call(NamedTuple):
    """What one call of a layer was given and gave, and what that was added to, in its own terms."""

    inputs: torch.Tensor
    output: torch.Tensor
    stream: torch.Tensor | None = None


def fit_layers(
    dense: IsoPruneForImageClassification,
    pruned: IsoPruneForImageClassification,
    masks: Mapping[tuple[str, int], np.ndarray],
    batches: Batches,
    accelerator: Accelerator | None = None,
    *,
    factors: Mapping[str, torch.Tensor] | None = None,
    is_bias_only: bool = False,
) -> tuple[str, ...]:
    """Fit the layers of a cut network, in place, to those of the dense one.

    Args:
        dense: The network before the cut; left untouched.
        pruned: The cut network.
        masks: (parameter, dim) -> which of its elements stay.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,); a pass for each layer begins at
            the last waypoint before it.
        accelerator: Ranks that share the images; float64 sums are added over them once for every layer.
        factors: Weight -> what the dense outputs are multiplied with, one number for each that stays.
        is_bias_only: Fit what is added to the outputs, and no weights: their means become those of the dense layer.

    Returns:
        A line for the layers that could not be fitted.

    Raises:
        RecipeError: There is no image.
    """
    with scoring_mode(dense, requires_grad=False), scoring_mode(pruned, requires_grad=False), torch.no_grad():
        layers, left = _order(pruned, masks, factors or {})
        passes = Passes(dense, pruned, batches)
        for layer in layers:
            passes.reach(layer.name)
            _fit(dense, pruned, layer, passes, accelerator, is_bias_only)
    return (
        (f"prune.reconstruct leaves {', '.join(left)} as cut: their layers compute in a way of their own",)
        if left
        else ()
    )


def _order(
    pruned: IsoPruneForImageClassification,
    masks: Mapping[tuple[str, int], np.ndarray],
    factors: Mapping[str, torch.Tensor],
) -> tuple[list[Layer], list[str]]:
    """Layers in the order of execution, and those among them that are of no kind that can be fitted."""
    calls: dict[str, int] = {}
    written: dict[int, tuple[torch.Tensor, str]] = {}  # outputs are held, so that their identities stay
    norms: dict[str, nn.Module] = {}

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        written[id(output)] = output, name

    def before(module: nn.Module, args: Any) -> None:
        if args and id(args[0]) in written:
            norms[written[id(args[0])][1]] = module

    handles = []
    for name, module in pruned.model.named_modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before))
        elif isinstance(module, (nn.Linear, ConvNd, nn.LayerNorm)):
            handles.append(module.register_forward_hook(partial(after, name)))
    blank = torch.zeros(1, *pruned.config.image_size, device=pruned.device)
    try:
        pruned(pixel_values=blank)
    finally:
        for handle in handles:
            handle.remove()
    layers, left = [], []
    for name, count in calls.items():
        module, weight = pruned.model.get_submodule(name), f"{name}.weight"
        mask = masks.get((weight, 0))
        if isinstance(module, nn.LayerNorm) and (mask is None or not module.elementwise_affine):
            continue  # its channels all stay
        if isinstance(module, nn.LayerNorm) or type(module).forward in (nn.Linear.forward, nn.Conv2d.forward):
            kept = None if mask is None else torch.from_numpy(np.flatnonzero(mask)).to(pruned.device)
            bias = getattr(module, "bias", None)
            norm = norms.get(name) if bias is None else None
            layer = Layer(name, count, kept, factors.get(weight), norm, count == 1)
            if layer.is_added and _run(pruned, layer, blank)[0].stream is None:
                layer = layer._replace(is_added=False)
            layers.append(layer)
        else:
            left.append(name)
    return layers, left


def _fit(
    dense: IsoPruneForImageClassification,
    pruned: IsoPruneForImageClassification,
    layer: Layer,
    passes: Passes,
    accelerator: Accelerator | None,
    is_bias_only: bool,
) -> None:
    module = pruned.model.get_submodule(layer.name)
    halves = [no_sums(module, pruned.device) for _ in range(2)]
    for images, begin in passes:
        with begin(dense), begin(pruned):
            calls = zip(_run(dense, layer, images), _run(pruned, layer, images), strict=True)
        for wanted, found in calls:
            dim = _channel_dim(module, wanted.output, found.output)
            missing = _missing(layer, wanted, found, dim)
            for half, part in halves_of(module, found.inputs):
                added = add_up(module, found.inputs[part], found.output[part], missing[part], dim)
                for key, value in added.items():
                    halves[half][key] += value
    halves = [sum_over_ranks(sums, accelerator) for sums in halves]
    sums = {key: halves[0][key] + halves[1][key] for key in halves[0]}
    if not sums["count"]:
        raise RecipeError("the calibration sample holds no image: prune.reconstruct needs at least one")
    if sums["residual"] <= _SAME * sums["energy"]:
        return
    _change(module, layer, solve(sums, is_bias_only or holds_for_bias_alone(*halves)))


def _run(model: IsoPruneForImageClassification, layer: Layer, images: torch.Tensor) -> list[Call]:
    """All calls of a layer; what comes after them, and after the sum, is not computed."""
    calls: list[Call] = []

    def on_call(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        calls.append(Call(args[0], output.clone() if layer.is_added else output))
        if layer.is_added:
            stream.follow(output)
        elif len(calls) == layer.calls:
            raise Reached

    def on_sum(other: torch.Tensor) -> None:
        calls[0] = calls[0]._replace(stream=other)
        raise Reached

    stream = Stream(on_sum)
    handle = model.model.get_submodule(layer.name).register_forward_hook(on_call)
    try:
        with stream if layer.is_added else nullcontext():
            model(pixel_values=images)
    except Reached:
        pass
    finally:
        handle.remove()
    return calls


def _missing(layer: Layer, wanted: Call, found: Call, dim: int) -> torch.Tensor:
    """What the outputs lack to those of the dense layer; of a layer that writes into a stream, what the sum lacks."""
    target = _kept(wanted.output, layer, dim)
    if layer.factor is not None:
        target = target * layer.factor.view([-1 if at == dim else 1 for at in range(target.ndim)])
    missing = target - found.output
    return missing if found.stream is None else missing + (_kept(wanted.stream, layer, dim) - found.stream)


def _kept(values: torch.Tensor, layer: Layer, dim: int) -> torch.Tensor:
    return values if layer.kept is None else values.index_select(dim, layer.kept)


def _channel_dim(module: nn.Module, dense: torch.Tensor, output: torch.Tensor) -> int:
    """Where the channels lie; a norm is fitted only where it has lost some, so there the sizes differ."""
    if isinstance(module, nn.LayerNorm):
        return next(dim for dim in range(output.ndim) if dense.shape[dim] != output.shape[dim])
    return 1 if isinstance(module, nn.Conv2d) else output.ndim - 1


def _change(module: nn.Module, layer: Layer, change: torch.Tensor) -> None:
    """Add to weights and biases what was solved for: (G, F + 1, O), or the last row of it."""
    shift = change[:, -1].flatten()
    if isinstance(module, nn.LayerNorm):
        if change.shape[1] > 1:
            scale = 1 + change[:, 0, 0]
            module.weight.copy_(module.weight * scale)
            if module.bias is not None:
                module.bias.copy_(module.bias * scale)
    elif change.shape[1] > 1:
        module.weight += change[:, :-1].mT.reshape(module.weight.shape).to(module.weight.dtype)
    if module.bias is not None:
        module.bias += shift.to(module.bias.dtype)
    elif layer.norm is not None:
        layer.norm.running_mean -= shift.to(layer.norm.running_mean.dtype)
