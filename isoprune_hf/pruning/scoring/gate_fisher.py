"""Gates: the derivative of each image's loss by a number that every use of a channel is multiplied with.

A gate is 1, and 0 once the channel has left. With g_n its derivative for image n, E[g_n^2] / 2 is the loss that its
removal costs, to second order with the Fisher information in the place of the Hessian (Theis et al., Faster gaze
prediction with dense networks and Fisher pruning, 2018): in units of loss, so channels of any layer compare.

Where a gate acts: on what the layers after the group read of the channel, and of two that follow each other, as a
depthwise convolution and the layer behind it, on the last: both would see the whole channel. The dims of an attention
meet others in two products, and no layer reads queries and keys: there it acts on what is written and on what is read,
and counts half, because either end of a product that is linear in both sees all of it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.gradients import (
    IMAGES,
    Batches,
    Precision,
    scoring_mode,
    sum_over_ranks,
    summed_loss,
    zero_images,
)
from isoprune_hf.pruning.calibration.resumable import KeptBatches, left_for
from isoprune_hf.pruning.graph.layers import ConvNd, is_depthwise
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.scoring.readers import find_reader

_PROBE = 2  # images by which the quick way is compared with the sure one


class End(NamedTuple):
    """A place where a gate acts.

    Args:
        group: Whose channels.
        member: Elements that use the channels.
        bias: Parameter that is written with the member's elements, at the same positions.
        layer: The layer that reads or writes them; empty where the weight is used without a call.
        is_output: The layer writes them.
        places: Where channel c lies in the layer's input or output: (channels, k).
    """

    group: str
    member: Member
    bias: str | None
    layer: str
    is_output: bool
    places: np.ndarray


def find_ends(model: nn.Module, groups: Sequence[CoupledGroup]) -> tuple[list[End], dict[str, float]]:
    """Find where the gates of groups act, and what their derivatives are to be multiplied with, by group."""
    ends, factors = [], {}
    for group in groups:
        readers = (_reader(model, group, member) for member in group.members)
        found = _last(model, [reader for reader in readers if reader is not None])
        factors[group.name] = 1.0
        if not found or group.num_heads or group.signature.startswith("Attention:"):
            found += [writer for member in group.members if (writer := _writer(model, group, member)) is not None]
            factors[group.name] = 0.5
        if not found:
            raise RecipeError(
                f"criterion gate_fisher finds no layer that reads or writes the channels of {group.name}; take "
                "--prune.criterion taylor"
            )
        ends += found
    return ends, factors


def gate_fisher(
    model: nn.Module,
    groups: Sequence[CoupledGroup],
    batches: Batches,
    accelerator: Accelerator | None = None,
    precision: Precision = "no",
    *,
    is_joint: bool = False,
) -> dict[str, torch.Tensor]:
    """Take the loss that the removal of each channel costs: E[g_n^2] / 2.

    Args:
        model: Its `model` owns the layers; its forward returns `logits`. Left as it was.
        groups: Groups of `trace_groups`.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        accelerator: Ranks that share the images; float64 sums are added over them once, at the end.
        precision: bf16 runs forward and backward under autocast.
        is_joint: Take what it costs after all channels of its group that cost less (see `remove_in_turn`). Needs
            channels^2 float64 numbers for each group.

    Returns:
        Group name -> (channels,) in float64, in nats.

    Raises:
        RecipeError: There is no image, or no layer uses the channels of a group.
    """
    ends, factors = find_ends(model, groups)
    shapes = {g.name: (g.channels, g.channels) if is_joint else (g.channels,) for g in groups}
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=model.device) for name, shape in shapes.items()}
    images = zero_images(model)
    # The way is chosen by the same images, wherever the sums go on.
    probe = list(itertools.islice(iter(batches), 1)) if isinstance(batches, KeptBatches) else None
    left = left_for({**sums, IMAGES: images}, batches)
    for gradients, labels in gate_gradients(model, ends, left, precision, probe):
        total: dict[str, torch.Tensor] = {}
        for end, gradient in zip(ends, gradients, strict=True):
            total[end.group] = total.get(end.group, 0) + factors[end.group] * gradient.double().sum(2)
        for name, gradient in total.items():
            sums[name] += gradient.T @ gradient if is_joint else gradient.square().sum(0)
        images += len(labels)
    sums, count = sum_over_ranks((sums, images), accelerator)
    if not count:
        raise RecipeError("the calibration sample holds no image: scoring needs at least one in the training split")
    losses = {name: (total / (2 * count)).cpu() for name, total in sums.items()}
    return {name: remove_in_turn(loss) for name, loss in losses.items()} if is_joint else losses


def remove_in_turn(losses: torch.Tensor) -> torch.Tensor:
    """Remove channels one after the other, always the one that costs least now; say what each has cost.

    The removal of a set S costs 1_S^T F 1_S, so channel c costs F_cc + 2 sum of F_cs over the channels s that have
    left; what a set of the first ones costs is the sum of its scores. A channel that costs less than one before it has
    the score of that one: the order stays the same.

    Args:
        losses: F = E[g_n g_n^T] / 2 of shape (channels, channels), in float64.

    Returns:
        (channels,) in float64; nan where losses are not finite.
    """
    if not losses.isfinite().all():
        return torch.full_like(losses[0], torch.nan)
    matrix = losses.numpy()
    costs, scores, highest = matrix.diagonal().copy(), np.zeros(len(matrix)), 0.0
    for _ in range(len(matrix)):
        cheapest = int(costs.argmin())
        highest = max(highest, costs[cheapest])
        scores[cheapest] = highest
        costs += 2 * matrix[:, cheapest]
        costs[cheapest] = np.inf
    return torch.from_numpy(scores)


def gate_gradients(
    model: nn.Module,
    ends: Sequence[End],
    batches: Batches,
    precision: Precision = "no",
    probe: Batches | None = None,
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Yield for each micro-batch the derivative by the gates of each end, (B, channels, k), and the labels.

    One pass with a gate for each image where that gives on the first images what gates on the weights give, image by
    image; otherwise (a layer's weight is used without a call, or images do not lie on dim 0) that slower way. The
    first images are those of `probe`, if it is given.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, 1)) if probe is None else []
    with scoring_mode(model, requires_grad=False):
        is_quick = all(
            _is_quick(model, ends, *(part[:_PROBE].to(model.device) for part in batch)) for batch in probe or first
        )
        measure = _batch_gates if is_quick else _weight_gates
        for images, labels in itertools.chain(first, batches):
            yield measure(model, ends, images.to(model.device), labels.to(model.device), precision), labels


def _last(model: nn.Module, readers: list[End]) -> list[End]:
    """Leave out depthwise layers: what they read comes to the next reader of the same channel, and counts there."""
    return [end for end in readers if not _is_depthwise(model, end)] or readers


def _is_depthwise(model: nn.Module, end: End) -> bool:
    layer = model.model.get_submodule(end.layer)
    return is_depthwise(layer)


def _reader(model: nn.Module, group: CoupledGroup, member: Member) -> End | None:
    reader = find_reader(model, member)
    if reader is not None:
        return End(group.name, member, None, reader[0], False, reader[1])
    name, _, leaf = member.parameter.rpartition(".")
    is_attention = isinstance(model.model.get_submodule(name), nn.MultiheadAttention)
    if is_attention and leaf.endswith("proj_weight") and member.dim == 1:  # it reads, and is not called
        return End(group.name, member, None, "", False, member.index)
    return None


def _writer(model: nn.Module, group: CoupledGroup, member: Member) -> End | None:
    name, _, leaf = member.parameter.rpartition(".")
    layer = model.model.get_submodule(name)
    is_layer = leaf == "weight" and isinstance(layer, (nn.Linear, ConvNd))
    if member.dim != int(is_layer and getattr(layer, "transposed", False)):
        return None
    if model.model.get_parameter(member.parameter).ndim < 2 or find_reader(model, member) is not None:
        return None
    biases = [other.parameter for other in group.members if other.parameter.rpartition(".")[0] == name]
    bias = next((other for other in biases if model.model.get_parameter(other).ndim == 1), None)
    return End(group.name, member, bias, name if is_layer else "", True, member.index)


def _is_quick(model: nn.Module, ends: Sequence[End], images: torch.Tensor, labels: torch.Tensor) -> bool:
    try:
        quick = _batch_gates(model, ends, images, labels, "no")
    except RuntimeError:
        return False
    sure = _weight_gates(model, ends, images, labels, "no")
    largest = max(float(gradient.abs().max()) for gradient in sure)
    if not math.isfinite(largest):  # what is not finite is named by those who use it
        return True
    pairs = ((one.sum(2), two.sum(2)) for one, two in zip(quick, sure, strict=True))
    return all(torch.allclose(one, two, rtol=1e-3, atol=1e-4 * largest) for one, two in pairs)


def _batch_gates(
    model: nn.Module, ends: Sequence[End], images: torch.Tensor, labels: torch.Tensor, precision: Precision
) -> list[torch.Tensor]:
    """Multiply inputs and outputs of layers with a gate for each image and channel."""
    if not all(end.layer for end in ends):
        raise RuntimeError("a weight is used without a call")
    gates: dict[tuple[str, bool], torch.Tensor] = {}
    with _hooks(model, ends, len(images), gates):
        loss = summed_loss(model, images, labels, precision)
    keys = [(end.layer, end.is_output) for end in ends]
    if not gates.keys() >= set(keys):
        raise RuntimeError("a layer is not called")
    gradients = dict(zip(gates, torch.autograd.grad(loss, list(gates.values()), allow_unused=True), strict=True))
    unused = {key: torch.zeros_like(gates[key]) for key, gradient in gradients.items() if gradient is None}
    gradients |= unused
    return [
        gradients[key][:, torch.from_numpy(end.places).to(images.device)] for key, end in zip(keys, ends, strict=True)
    ]


@contextmanager
def _hooks(
    model: nn.Module, ends: Sequence[End], batch: int, gates: dict[tuple[str, bool], torch.Tensor]
) -> Iterator[None]:
    def gated(layer: nn.Module, key: tuple[str, bool], x: torch.Tensor) -> torch.Tensor:
        dim = x.ndim - 1 if isinstance(layer, nn.Linear) else 1
        if key not in gates:  # a layer that is called twice has the same gates both times
            gates[key] = torch.ones(batch, x.shape[dim], device=x.device, requires_grad=True)
        shape = [batch, 1, *([1] * (x.ndim - 1))]
        shape[dim + 1] = x.shape[dim]
        return (x.unflatten(0, (batch, -1)) * gates[key].view(shape).to(x.dtype)).flatten(0, 1)

    def read(key: tuple[str, bool], layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gated(layer, key, args[0]), *args[1:])

    def write(key: tuple[str, bool], layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return gated(layer, key, output)

    handles = []
    for key in dict.fromkeys((end.layer, end.is_output) for end in ends):
        layer = model.model.get_submodule(key[0])
        register, hook = (layer.register_forward_hook, write) if key[1] else (layer.register_forward_pre_hook, read)
        handles.append(register(partial(hook, key)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight_gates(
    model: nn.Module, ends: Sequence[End], images: torch.Tensor, labels: torch.Tensor, precision: Precision
) -> list[torch.Tensor]:
    """Multiply the elements of weights that use a channel, image by image: right for every model."""
    parameters = dict(model.model.named_parameters())
    rows = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        gates = [torch.ones(end.member.index.shape, device=images.device, requires_grad=True) for end in ends]
        replaced: dict[str, torch.Tensor] = {}
        for end, gate in zip(ends, gates, strict=True):
            for name, dim in ((end.member.parameter, end.member.dim), (end.bias, 0)):
                if name is not None:
                    weight = replaced.get(name, parameters[name].detach())
                    replaced[name] = weight * _spread(gate, end.member.index, weight, dim)
        loss = summed_loss(model, image, label, precision, replaced)
        gradients = torch.autograd.grad(loss, gates, allow_unused=True)
        rows.append([torch.zeros_like(gate) if g is None else g for gate, g in zip(gates, gradients, strict=True)])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _spread(gate: torch.Tensor, index: np.ndarray, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """A factor for each position of a dim: 1 where the group has none."""
    factor = torch.ones(weight.shape[dim], device=weight.device)
    factor = factor.index_put((torch.from_numpy(index.reshape(-1)).to(weight.device),), gate.reshape(-1))
    return factor.view([-1 if at == dim else 1 for at in range(weight.ndim)])
