"""Derivatives of the loss of each image by gates on the channels of groups (`gate_gradients`).

There are two ways to compute them. `_batch_gates` multiplies inputs and outputs of layers by a gate for each image and
channel: one forward and one backward pass give the derivatives of a whole micro-batch. It is wrong if a weight is used
without calling its layer, or if images do not lie on dim 0 of a layer's input. `_weight_gates` multiplies the weights
themselves, image by image: right for every model, and slower by the size of the micro-batch. Which models the first
way fits cannot be read from their modules, so both are computed for the first images and compared.

Layers that run while gradients are off may be within reentrant activation checkpointing (`torch.utils.checkpoint`),
which runs them again in a backward pass if its inputs need a gradient: then the images do.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Batch, Batches
from isoprune_hf.pruning.calibration.gradients import scoring_mode, summed_loss
from isoprune_hf.pruning.calibration.inputs import read_tensor, replace_first_tensor
from isoprune_hf.pruning.calibration.replacing import replaced_parameters
from isoprune_hf.pruning.scoring.gate_points import GatePoint
from isoprune_hf.recipes.values import Precision

_COMPARED_IMAGES = 2
_GateKey = tuple[str, bool]  # layer, is_output


def gate_gradients(
    model: IsoPruneForImageClassification,
    points: Sequence[GatePoint],
    batches: Iterable[Batch],
    precision: Precision = "no",
    probe: Batches | None = None,
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Yield the derivatives by the gates of each point, for each micro-batch.

    Args:
        model: Its `model` owns the layers; its forward pass returns `logits`. Restored afterwards.
        points: Points of `find_gate_points`.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        precision: bf16 runs forward and backward passes under autocast.
        probe: Micro-batches whose first images decide between the two ways of the module; default is the first one of
            `batches`.

    Yields:
        One tensor (B, channels, k) for each point, and the labels.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, 1)) if probe is None else []
    with scoring_mode(model, requires_grad=False):
        compared = [
            [part[:_COMPARED_IMAGES].to(model.device).detach() for part in batch]
            for batch in (first if probe is None else probe)
        ]
        is_reentrant = any(_runs_without_gradients(model, points, images) for images, _ in compared)
        is_quick = all(
            _is_batch_way_right(model, points, images.requires_grad_(is_reentrant), labels)
            for images, labels in compared
        )
        measure = _batch_gates if is_quick else _weight_gates
        for images, labels in itertools.chain(first, batches):
            pixels = images.to(model.device).detach().requires_grad_(is_reentrant)
            yield measure(model, points, pixels, labels.to(model.device), precision), labels


def _runs_without_gradients(
    model: IsoPruneForImageClassification, points: Sequence[GatePoint], images: torch.Tensor
) -> bool:
    """Return whether some layer of a point runs while gradients are off."""
    modes: set[bool] = set()
    handles = [
        model.model.get_submodule(name).register_forward_pre_hook(lambda *_: modes.add(torch.is_grad_enabled()))
        for name in {point.layer for point in points} - {""}
    ]
    try:
        model(pixel_values=images)
    finally:
        for handle in handles:
            handle.remove()
    return False in modes


def _gradients(
    loss: torch.Tensor, gates: Sequence[torch.Tensor], images: torch.Tensor
) -> Sequence[torch.Tensor | None]:
    """Return the derivatives of a loss by gates; None for those that it does not depend on."""
    if not images.requires_grad:
        return torch.autograd.grad(loss, gates, allow_unused=True)
    torch.autograd.backward(loss)  # reentrant checkpointing refuses `grad`
    return [gate.grad for gate in gates]


def _is_batch_way_right(
    model: IsoPruneForImageClassification, points: Sequence[GatePoint], images: torch.Tensor, labels: torch.Tensor
) -> bool:
    """Check whether `_batch_gates` gives the derivatives that `_weight_gates` gives for these images."""
    try:
        quick = _batch_gates(model, points, images, labels, "no")
    except RuntimeError:  # of this module, or of torch if images do not lie on dim 0
        return False
    sure = _weight_gates(model, points, images, labels, "no")
    largest = max(float(gradient.abs().max()) for gradient in sure)
    if not math.isfinite(largest):  # the caller reports values that are not finite, by name
        return True
    pairs = ((one.sum(2), two.sum(2)) for one, two in zip(quick, sure, strict=True))
    return all(torch.allclose(one, two, rtol=1e-3, atol=1e-4 * largest) for one, two in pairs)


def _batch_gates(
    model: IsoPruneForImageClassification,
    points: Sequence[GatePoint],
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision,
) -> list[torch.Tensor]:
    """Compute all derivatives in one pass, with a gate for each image and channel at inputs and outputs of layers.

    Raises:
        RuntimeError: A weight is used without calling its layer.
    """
    if not all(point.layer for point in points):
        raise RuntimeError("a weight is used without calling its layer")
    gates: dict[_GateKey, torch.Tensor] = {}
    with _gate_hooks(model, points, len(images), gates):
        loss = summed_loss(model, images, labels, precision)
        keys = [(point.layer, point.is_output) for point in points]
        if not gates.keys() >= set(keys):
            raise RuntimeError("a layer is never called")
        # Within the hooks: activation checkpointing runs the layers again.
        found = _gradients(loss, list(gates.values()), images)
    gradients = {
        key: torch.zeros_like(gate) if gradient is None else gradient
        for (key, gate), gradient in zip(gates.items(), found, strict=True)
    }
    return [
        gradients[key][:, torch.from_numpy(point.places).to(images.device)]
        for key, point in zip(keys, points, strict=True)
    ]


@contextmanager
def _gate_hooks(
    model: IsoPruneForImageClassification,
    points: Sequence[GatePoint],
    batch: int,
    gates: dict[_GateKey, torch.Tensor],
) -> Iterator[None]:
    """Multiply inputs and outputs of layers by gates (batch, channels), which the first call adds to `gates`."""

    def gated(layer: nn.Module, key: _GateKey, x: torch.Tensor) -> torch.Tensor:
        dim = x.ndim - 1 if isinstance(layer, nn.Linear) else 1
        if key not in gates:  # a layer that is called twice has the same gates both times
            gates[key] = torch.ones(batch, x.shape[dim], device=x.device, requires_grad=True)
        shape = [batch, 1, *([1] * (x.ndim - 1))]
        shape[dim + 1] = x.shape[dim]
        return (torch.unflatten(x, 0, (batch, -1)) * gates[key].view(shape).to(x.dtype)).flatten(0, 1)

    def gate_input(key: _GateKey, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_first_tensor(args, kwargs, gated(layer, key, read_tensor(args, kwargs)))

    def gate_output(key: _GateKey, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return gated(layer, key, output)

    handles = []
    for key in dict.fromkeys((point.layer, point.is_output) for point in points):
        layer = model.model.get_submodule(key[0])
        if key[1]:
            handles.append(layer.register_forward_hook(partial(gate_output, key)))
        else:
            handles.append(layer.register_forward_pre_hook(partial(gate_input, key), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight_gates(
    model: IsoPruneForImageClassification,
    points: Sequence[GatePoint],
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision,
) -> list[torch.Tensor]:
    """Compute the derivatives image by image, with gates on the elements of weights that use a channel."""
    parameters = dict(model.model.named_parameters())
    rows = []
    for image, label in zip(torch.split(images, 1), torch.split(labels, 1), strict=True):
        gates = [torch.ones(point.member.index.shape, device=images.device, requires_grad=True) for point in points]
        replaced: dict[str, torch.Tensor] = {}
        for point, gate in zip(points, gates, strict=True):
            for name, dim in ((point.member.parameter, point.member.dim), (point.bias, 0)):
                if name is not None:
                    weight = replaced.get(name, parameters[name].detach())
                    replaced[name] = weight * _factors_along(gate, point.member.index, weight, dim)
        with replaced_parameters(model.model, replaced):
            loss = summed_loss(model, image, label, precision)
            gradients = _gradients(loss, gates, image)
        rows.append([torch.zeros_like(gate) if g is None else g for gate, g in zip(gates, gradients, strict=True)])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _factors_along(gate: torch.Tensor, index: np.ndarray, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the gate at each position of a dim, and 1 at positions that belong to no channel of the group.

    Args:
        gate: (channels, k).
        index: Positions of the gates on `dim`: (channels, k).
        weight: Tensor that the result is multiplied with.
        dim: Dim of the weight.
    """
    factor = torch.ones(weight.shape[dim], device=weight.device)
    factor = factor.index_put((torch.from_numpy(index.reshape(-1)).to(weight.device),), gate.reshape(-1))
    return factor.view([-1 if at == dim else 1 for at in range(weight.ndim)])
