"""The diagonal of the empirical Fisher: the mean over all images of the squared gradient of each image.

`mean_squared_gradients` computes it. Scripts of other projects run one backward pass over a micro-batch for each image
in it. Here one pass per micro-batch is enough for nearly all parameters.

Design note: why there are three ways, and how one is chosen. The gradient of one image by the weight of a linear or a
convolution is a small formula of the layer's input and of the gradient at its output, both of which a single pass over
the whole micro-batch has (`layer_squares`, `streamed_squares`); only the per-sample gradients of one layer exist at a
time. This is wrong for a weight that is tied, used without calling its layer, or owned by a layer that is called twice
or whose samples do not lie on dim 0. `torch.func.vmap` of the whole model (`vmapped_squares`) is right for these, but
holds the per-sample gradients of all its parameters at once, and it refuses models that branch on values. For them
only a loop over images remains (`looped_squares`). None of this can be read from the modules, so `choose_ways`
computes three random images in the first way, compares each parameter with the loop, and gives the rest to `vmap` or
to the loop. Nothing is timed: every rank chooses the same.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.gradients import (
    IMAGES,
    mean_over_ranks,
    scoring_mode,
    zero_images,
    zero_sums,
)
from isoprune_hf.pruning.calibration.resumable import remaining
from isoprune_hf.pruning.scoring.layer_squares import Squares
from isoprune_hf.pruning.scoring.per_sample_gradients import looped_squares, streamed_squares, vmapped_squares
from isoprune_hf.recipes.values import Precision

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 3
_RELATIVE_TOLERANCE = 1e-3
_ROUNDING_SHARE = 1e-11  # of the largest squared gradient of a parameter: smaller ones consist of rounding errors


@dataclass(frozen=True)
class Ways:
    """The method by which each parameter gets its squared per-sample gradients; names are relative to the base.

    Args:
        layers: Module -> leaves: from input and output gradient of the module (`module_squares`).
        expanded: Parameters of shape (1, ...) that the forward pass accepts as (B, ...): tokens and positions.
        vmapped: By `torch.func.vmap` over the whole model.
        looped: Image by image.
    """

    layers: Mapping[str, tuple[str, ...]]
    expanded: tuple[str, ...] = ()
    vmapped: tuple[str, ...] = ()
    looped: tuple[str, ...] = ()


def mean_squared_gradients(
    model: IsoPruneForImageClassification, names: Iterable[str], calibration: Calibration
) -> dict[str, torch.Tensor]:
    """Compute the mean over all images of all ranks of the squared gradient of the cross-entropy of each image.

    Args:
        model: Its `model` owns the parameters; its forward pass returns `logits`. Restored afterwards.
        names: Parameters, relative to `model.model`.
        calibration: Images and labels; float64 sums are reduced over ranks once, at the end.

    Returns:
        Name -> E[g_n^2] in float32, of the shape of the parameter.

    Raises:
        RecipeError: There is no image.

    Source:
        Le Cun et al., Optimal Brain Damage, NeurIPS 1989, with the diagonal of the empirical Fisher for the Hessian.
    """
    names = tuple(names)
    if not names:
        return {}
    sums = zero_sums({name: model.model.get_parameter(name) for name in names})
    images = zero_images(model)
    ways: Ways | None = None
    with scoring_mode(model, requires_grad=False):
        for pixel_values, labels in remaining({**sums, IMAGES: images}, calibration):
            pixel_values = pixel_values.to(model.device)
            labels = labels.to(model.device)
            if ways is None:
                ways = choose_ways(model, names, tuple(pixel_values.shape[1:]), labels[:1])
            for name, square in squared_gradients(model, ways, pixel_values, labels, calibration.precision).items():
                sums[name] += square
            images += len(labels)
    return mean_over_ranks(sums, images, calibration.accelerator)


def squared_gradients(
    model: IsoPruneForImageClassification,
    ways: Ways,
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision = "no",
) -> Squares:
    """Compute the sum of the squared per-sample gradients of one micro-batch.

    The model must be in `scoring_mode` without gradients. Parameters that the loss does not depend on are omitted.
    """
    squares: Squares = {}
    if ways.layers or ways.expanded:
        squares |= streamed_squares(model, ways.layers, ways.expanded, images, labels, precision)
    if ways.vmapped:
        squares |= vmapped_squares(model, ways.vmapped, images, labels, precision)
    if ways.looped:
        squares |= looped_squares(model, ways.looped, images, labels, precision)
    return squares


def choose_ways(
    model: IsoPruneForImageClassification, names: Collection[str], image_size: tuple[int, ...], label: torch.Tensor
) -> Ways:
    """Choose the cheapest correct way for each parameter (see the module); the choice is the same on every rank.

    If the parameters that the layers get wrong have more than half of all elements, all parameters go through vmap:
    a second pass for the others would cost more.

    Args:
        model: In `scoring_mode` without gradients.
        names: Parameters, relative to `model.model`.
        image_size: (C, H, W).
        label: The label of all images that are tried, (1, ...).
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_PROBE_IMAGES, *image_size, generator=generator).to(model.device)
    labels = label.repeat_interleave(_PROBE_IMAGES, 0)
    expected = looped_squares(model, names, images, labels)
    ways = _candidates(model.model, names)
    try:
        found = streamed_squares(model, ways.layers, ways.expanded, images, labels, is_probe=True)
    except RuntimeError:  # the forward pass does not accept one token for each sample
        found = streamed_squares(model, ways.layers, (), images, labels, is_probe=True)
    floor = _ROUNDING_SHARE * max(_rms(square) for square in expected.values())
    right = {
        name
        for name, square in expected.items()
        if name in found and _rms(found[name] - square) <= _RELATIVE_TOLERANCE * _rms(square) + floor
    }
    sizes = {name: model.model.get_parameter(name).numel() for name in names}
    rest = tuple(name for name in names if name not in right)
    if 2 * sum(sizes[name] for name in rest) > sum(sizes.values()):
        rest = tuple(names)
        right = set()
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
    """Sort parameters that are not tied into those of layers and those that may be expanded to one for each sample."""
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
