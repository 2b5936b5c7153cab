"""The diagonal of the (empirical Fisher) Hessian: the mean over all images of the squared gradient of each image.

The loop of older scripts runs the backward pass of the whole micro-batch once for each image. Here one pass is enough
for nearly all parameters (`squares.py`); the rest goes through `torch.func.vmap`, or image by image.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.pruning.calibration.gradients import (
    IMAGES,
    Batches,
    Precision,
    mean_over_ranks,
    scoring_mode,
    sum_over_ranks,
    zero_images,
    zero_sums,
)
from isoprune_hf.pruning.calibration.resumable import left_for
from isoprune_hf.pruning.scoring.layer_squares import Squares
from isoprune_hf.pruning.scoring.per_sample_gradients import looped_squares, streamed_squares, vmapped_squares

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 3


@dataclass(frozen=True)
class Ways:
    """How the squared per-sample gradients of each parameter are found; names are relative to the base.

    Args:
        layers: Module -> leaves: from input and output gradient of the module (`module_squares`).
        expanded: Parameters of shape (1, ...) that the forward pass takes as (B, ...): tokens and positions.
        vmapped: By `torch.func.vmap` over the whole model.
        looped: Image by image: always right, and slow.
    """

    layers: Mapping[str, tuple[str, ...]]
    expanded: tuple[str, ...] = ()
    vmapped: tuple[str, ...] = ()
    looped: tuple[str, ...] = ()


def mean_squared_gradients(
    model: nn.Module,
    names: Iterable[str],
    batches: Batches,
    accelerator: Accelerator | None = None,
    precision: Precision = "no",
) -> dict[str, torch.Tensor]:
    """Take the mean over all images of all ranks of the squared gradient of the cross-entropy of each image.

    Args:
        model: Its `model` owns the parameters; its forward returns `logits`. Left as it was.
        names: Parameters, relative to `model.model`.
        batches: This rank's micro-batches: images (B, C, H, W), labels (B,).
        accelerator: Ranks that share the images; their float64 sums are added once, at the end.
        precision: bf16 runs forward and backward under autocast; the sums stay float64.

    Returns:
        Name -> E[g_n^2] in float32, of the shape of the parameter.

    Raises:
        RecipeError: There is no image, or a gradient is not finite.

    Source:
        Le Cun et al., Optimal Brain Damage, NeurIPS 1989, with the diagonal of the empirical Fisher for the Hessian.
    """
    names = tuple(names)
    sums = zero_sums({name: model.model.get_parameter(name) for name in names})
    images, ways = zero_images(model), None
    with scoring_mode(model, requires_grad=False):
        for pixel_values, labels in left_for({**sums, IMAGES: images}, batches):
            pixel_values, labels = pixel_values.to(model.device), labels.to(model.device)
            ways = ways or choose_ways(model, names, tuple(pixel_values.shape[1:]))
            for name, square in squared_gradients(model, ways, pixel_values, labels, precision).items():
                sums[name] += square
            images += len(labels)
    return mean_over_ranks(sums, images, accelerator)


def last_squared_gradient(
    model: nn.Module,
    names: Iterable[str],
    batches: Batches,
    accelerator: Accelerator | None = None,
    precision: Precision = "no",
) -> dict[str, torch.Tensor]:
    """Take the squared gradient of the very last image alone: a known defect, kept for parity with old scripts.

    torch-pruning 1.6.1 looks for the name of a parameter in a dictionary whose keys are parameters, so every image
    overwrites what was there (`accumulate_grad`), and only the last one counts. The last micro-batch lies on the
    highest of the ranks that have most of them: number k is on rank k % world.

    Args, Returns and Raises as in `mean_squared_gradients`.
    """
    sums = zero_sums({name: model.model.get_parameter(name) for name in names})
    count, last = 0, None
    for count, last in enumerate(batches, start=1):  # noqa: B007
        pass
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    counts = torch.zeros(world, dtype=torch.int64, device=model.device)
    counts[rank] = count
    counts = sum_over_ranks(counts, accelerator).tolist()
    owner = max(range(world), key=lambda number: (counts[number], number))
    if rank == owner and last is not None:
        with scoring_mode(model, requires_grad=False):
            image, label = (part[-1:].to(model.device) for part in last)
            for name, square in looped_squares(model, tuple(sums), image, label, precision).items():
                sums[name] += square
    return mean_over_ranks(sums, zero_images(model) + int(rank == owner and last is not None), accelerator)


def squared_gradients(
    model: nn.Module, ways: Ways, images: torch.Tensor, labels: torch.Tensor, precision: Precision = "no"
) -> Squares:
    """Sum the squared per-sample gradients of one micro-batch; what the loss does not reach is left out.

    The model has to be in `scoring_mode` without gradients.
    """
    squares: Squares = {}
    if ways.layers or ways.expanded:
        squares |= streamed_squares(model, ways.layers, ways.expanded, images, labels, precision)
    if ways.vmapped:
        squares |= vmapped_squares(model, ways.vmapped, images, labels, precision)
    if ways.looped:
        squares |= looped_squares(model, ways.looped, images, labels, precision)
    return squares


def choose_ways(model: nn.Module, names: Collection[str], image_size: tuple[int, ...]) -> Ways:
    """Choose for each parameter the cheapest way that is right, the same on every rank: nothing is timed.

    Three random images go through the layers and, as a proof, one by one. A parameter that differs (its layer is
    called twice, its weight is used without the layer, its samples lie elsewhere than on dim 0) is left to vmap. Where
    that holds more than half of all elements, all go through vmap: a second pass for the rest would cost more.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_PROBE_IMAGES, *image_size, generator=generator).to(model.device)
    labels = torch.zeros(_PROBE_IMAGES, dtype=torch.int64, device=model.device)
    expected = looped_squares(model, names, images, labels)
    ways = _candidates(model.model, names)
    try:
        found = streamed_squares(model, ways.layers, ways.expanded, images, labels, is_probe=True)
    except RuntimeError:  # the forward pass does not take one token for each sample
        found = streamed_squares(model, ways.layers, (), images, labels, is_probe=True)
    floor = 1e-11 * max(_rms(square) for square in expected.values())  # below it, gradients are rounding alone
    right = {
        name
        for name, square in expected.items()
        if name in found and _rms(found[name] - square) <= 1e-3 * _rms(square) + floor
    }
    sizes = {name: model.model.get_parameter(name).numel() for name in names}
    rest = tuple(name for name in names if name not in right)
    if 2 * sum(sizes[name] for name in rest) > sum(sizes.values()):
        rest, right = tuple(names), set()
    layers = {
        path: tuple(leaf for leaf in leaves if f"{path}.{leaf}" in right) for path, leaves in ways.layers.items()
    }
    layers = {path: leaves for path, leaves in layers.items() if leaves}
    expanded = tuple(name for name in ways.expanded if name in right)
    try:
        if rest:
            vmapped_squares(model, rest, images, labels)
            logger.info("hessian: %d of %d parameters need vmap over the whole model", len(rest), len(sizes))
        return Ways(layers, expanded, vmapped=rest)
    except RuntimeError:  # torch.func does not run every model
        logger.info("hessian: %d of %d parameters need a pass for each image", len(rest), len(sizes))
        return Ways(layers, expanded, looped=rest)


def _candidates(base: nn.Module, names: Collection[str]) -> Ways:
    uses = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    layers: dict[str, list[str]] = {}
    expanded = []
    for name in names:
        parameter = base.get_parameter(name)
        path, _, leaf = name.rpartition(".")
        owner = base.get_submodule(path)
        if uses[id(parameter)] > 1:
            continue
        if parameter.ndim > 1 and len(parameter) == 1 and any(owner.children()):
            expanded.append(name)
        elif path:
            layers.setdefault(path, []).append(leaf)
    return Ways({path: tuple(leaves) for path, leaves in layers.items()}, tuple(expanded))


def _rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()
