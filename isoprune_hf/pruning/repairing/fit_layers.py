"""Fit a cut network to the dense one, layer by layer and without training (`fit_layers`).

In the order of execution each linear, convolution and cut LayerNorm gets the weights that bring its outputs nearest to
those of the dense layer, given the inputs that the layers before it (already fitted) produce. With x the inputs of all
images and positions, y the dense outputs of the channels that were kept, and W the weights after the cut:

    W' = W + (sum (y - W x) x^T) (sum x x^T + D)^-1,    D = ridge x diag(sum x x^T) + a floor,

where x and y - W x are without their means, so that the bias is not damped. The ridge keeps W' near W and not near 0:
directions that the sample does not determine keep the weights of the cut. It is chosen by cross-validation between
halves of the images, for each layer; it may be infinite, which fits the bias alone, and a layer of which no fit to one
half removes any error of the other one is left as it is. It is raised where W' would be many times larger than W.
Labels are not used.

W' is then scaled so that each output has the variance of the dense one (see `output_variance`), unless the output is
added to a residual stream.

For fewer rows than features the same solution follows from a matrix of the size of the rows. A layer whose equations
need too much memory in either form is left as it is.

Source:
    He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, without the ridge.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.gradients import require_images, scoring_mode, sum_over_ranks
from isoprune_hf.pruning.graph.output_masks import OutputMasks
from isoprune_hf.pruning.partial_passes.passes import Images, Passes
from isoprune_hf.pruning.partial_passes.storage import Storage
from isoprune_hf.pruning.partial_passes.waypoints import find_waypoints
from isoprune_hf.pruning.plan import note_left
from isoprune_hf.pruning.repairing.dense_outputs import DenseOutput, DenseOutputs
from isoprune_hf.pruning.repairing.equations import Equations
from isoprune_hf.pruning.repairing.fitted_rows import FittedModule, WaitingRows, pieces_of_halves, rows_of, size_of
from isoprune_hf.pruning.repairing.layer_calls import FittedLayer, LayerCall, find_layers, observe_calls
from isoprune_hf.pruning.repairing.output_variance import DenseMoments, match_variance
from isoprune_hf.pruning.repairing.ridge import RidgeSearch, form_of_fit, solve_within_bounds
from isoprune_hf.pruning.repairing.trials import Share, Trial, shares_of
from isoprune_hf.terminal import with_progress

_NEGLIGIBLE_RESIDUAL_SHARE = 1e-10  # of the energy of the outputs
_MAX_BYTES = 2**33  # of the equations of a layer and their solution
_TOO_LARGE = "the equations of their fits need too much memory"
_NOT_FINITE = "their fits are not finite"
_OTHER_ROWS = "the cut model runs them on other rows"
_NO_BIAS = "only a bias could be fitted, and they have none"


def fit_layers(
    dense: IsoPruneForImageClassification,
    pruned: IsoPruneForImageClassification,
    masks: Mapping[tuple[str, int], np.ndarray],
    calibration: Calibration,
    *,
    outputs: OutputMasks | None = None,
    factors: Mapping[str, torch.Tensor] | None = None,
    is_bias_only: bool = False,
    max_bytes: int = _MAX_BYTES,
    trial: Trial | None = None,
    selecting: Collection[str] = (),
) -> tuple[str, ...]:
    """Fit the layers of a cut network, in place, to those of the dense one.

    Args:
        dense: The network before the cut; left untouched.
        pruned: The cut network.
        masks: (parameter, dim) -> which of its elements were kept.
        calibration: Images. The equations of a layer are reduced over ranks once.
        outputs: Layer -> for each call, dim of its output -> which of its elements were kept. Without it, a layer is
            left as it was cut if other dims than that of its channels became smaller.
        factors: Weight -> factors for the dense outputs of its layer, one for each that was kept.
        is_bias_only: Fit biases and no weights: the means of the outputs become those of the dense layer.
        max_bytes: Largest number of bytes of the equations of a layer and their solution.
        trial: A copy of the cut network that is fitted as well, but without some of the images.
        selecting: Modules whose code selects by values what the layers in them read.

    Returns:
        Notes on the layers that were left as they were cut.

    Raises:
        RecipeError: There is no image.
    """
    shares = shares_of(pruned, Images([pixels for pixels, _ in calibration.batches]), trial)
    with ExitStack() as modes:
        for network in (dense, *(share.network for share in shares)):
            modes.enter_context(scoring_mode(network, requires_grad=False))
        modes.enter_context(torch.no_grad())
        layers, left = find_layers(dense, pruned, masks, outputs or {}, factors or {}, selecting)
        accelerator = calibration.accelerator
        storage = Storage.of_ranks(dense.device, accelerator)
        images = shares[-1].images
        count = _count_images(images, dense.device, accelerator)
        sizes = {layer.name: size_of(layer.module, is_bias_only=is_bias_only) for layer in layers}
        forms = {layer.name: form_of_fit(sizes[layer.name], count * layer.positions, max_bytes) for layer in layers}
        fitted = [layer for layer in layers if forms[layer.name]]
        find = partial(find_waypoints, layers=[layer.name for layer in fitted])
        wanted = DenseOutputs(Passes(dense, images, cache(partial(find, dense)), storage), fitted)
        ways = cache(partial(find, pruned))  # those of its copies are the same
        fits = [(share, Passes(share.network, share.images, ways, storage)) for share in shares]
        ridges = RidgeSearch()
        for layer in with_progress(layers, "repair", "layer", rank=calibration.rank):
            form = forms[layer.name]
            if form is None:
                left.setdefault(_TOO_LARGE, []).append(layer.name)
                continue
            equations = partial(form.empty, sizes[layer.name], pruned.device)
            reason = _fit_networks(layer, fits, wanted.of_next(), equations, ridges, accelerator, is_bias_only)
            if reason is not None:
                left.setdefault(reason, []).append(layer.name)
    notes = note_left("left as cut by prune.reconstruct", "layer", left)
    return (
        notes if layers else ("prune.reconstruct changes nothing: the model has no layer that can be fitted", *notes)
    )


def _count_images(images: Images, device: torch.device, accelerator: Accelerator | None) -> int:
    """Count the images of all ranks.

    Raises:
        RecipeError: There is no image.
    """
    count = sum_over_ranks(torch.tensor(images.count, device=device), accelerator)
    require_images(count, "prune.reconstruct")
    return int(count)


def _fit_networks(
    layer: FittedLayer,
    fits: Sequence[tuple[Share, Passes]],
    wanted: Sequence[Sequence[DenseOutput]],
    equations: Callable[[], Equations],
    ridges: RidgeSearch,
    accelerator: Accelerator | None,
    is_bias_only: bool,
) -> str | None:
    """Fit a layer of several copies of a network, in place.

    Returns:
        The reason if the layer of the last one is left as it was cut.
    """
    reason: str | None = None
    for share, passes in fits:
        own = layer.in_network(passes.network)
        halves = [equations() for _ in range(2)]
        moments = DenseMoments.empty(size_of(own.module, is_bias_only=is_bias_only), passes.network.device)
        is_same = _add_images(passes, own, wanted[share.first :], halves, moments, is_bias_only)
        for half in halves:
            half.add_ranks(accelerator)
        moments.add_ranks(accelerator)
        if sum_over_ranks(torch.tensor(not is_same, dtype=torch.int64, device=passes.network.device), accelerator):
            return _OTHER_ROWS
        if share.has_own_ridges:
            ridge = _choose_ridge(own, ridges, *halves, is_bias_only=is_bias_only)
        reason = _fit(passes.network, own, *halves, moments=moments, ridge=ridge)
    return reason


def _add_images(
    passes: Passes,
    layer: FittedLayer,
    outputs: Sequence[Sequence[DenseOutput]],
    halves: Sequence[Equations],
    moments: DenseMoments,
    is_bias_only: bool,
) -> bool:
    """Add the rows of both halves of this rank's images to the equations and moments of a layer, in place.

    Returns:
        False if the cut network runs the layer on other rows than the dense one, or another number of times.
    """
    size = size_of(layer.module, is_bias_only=is_bias_only)
    waiting = [WaitingRows(size, half.add, moments.add) for half in halves]
    through = passes.through(layer.name)
    for (images, begin), wanted_calls in zip(through, outputs, strict=False):  # there may be more outputs than images
        with begin():
            found_calls = observe_calls(passes.network, layer, images)
        if [call.output.shape for call in wanted_calls] != [call.output.shape for call in found_calls]:
            return False
        for wanted, found in zip(wanted_calls, found_calls, strict=True):
            missing = _missing_output(layer, wanted, found)
            for half, part in pieces_of_halves(layer.window, found.inputs):
                rows = rows_of(
                    layer.module,
                    layer.window,
                    size,
                    x=found.inputs[part],
                    output=found.output[part],
                    missing=missing[part],
                    dim=layer.dim,
                )
                waiting[half].add(rows)
    for rest in waiting:
        rest.flush()
    return True


def _choose_ridge(
    layer: FittedLayer, ridges: RidgeSearch, first: Equations, second: Equations, *, is_bias_only: bool
) -> float | None:
    """Return the ridge for a layer; None if the layer is best left as it was cut."""
    if _is_negligible(first, second):
        return None
    return math.inf if is_bias_only else ridges.choose(layer.name, first, second, has_shift=layer.has_shift)


def _is_negligible(first: Equations, second: Equations) -> bool:
    energy, residual, _ = first.totals + second.totals
    return bool(residual <= _NEGLIGIBLE_RESIDUAL_SHARE * energy)


def _fit(
    pruned: IsoPruneForImageClassification,
    layer: FittedLayer,
    first: Equations,
    second: Equations,
    *,
    moments: DenseMoments,
    ridge: float | None,
) -> str | None:
    """Fit one layer, in place, to both halves of the images of all ranks; the first half absorbs the second one.

    The outputs get the variance of the dense ones, unless they are added to others or their mean cannot be kept.

    Returns:
        The reason if the layer is left as it was cut.
    """
    if _is_negligible(first, second):
        return None
    if not (first.is_finite() and second.is_finite()):
        return _NOT_FINITE
    if ridge is None:
        return None
    if math.isinf(ridge) and not layer.has_shift:
        return _NO_BIAS
    first.absorb(second)
    if isinstance(layer.module, nn.LayerNorm):
        change = first.solve(ridge, has_shift=layer.has_shift)
    else:
        weights = _grouped_weights(layer.module)
        change = solve_within_bounds(first, weights, ridge, has_shift=layer.has_shift)
        if not layer.is_added and layer.has_shift and change.shape[1] > 1:
            match_variance(change, weights, first, moments)
    if not change.to(layer.module.weight.dtype).isfinite().all():
        return _NOT_FINITE
    _apply_change(pruned, layer, change)
    return None


def _grouped_weights(module: FittedModule) -> torch.Tensor:
    """Return the weights of a layer in the layout of a change, (G, F, O)."""
    size = size_of(module)
    return module.weight.reshape(size.groups, size.outputs, -1).mT


def _missing_output(layer: FittedLayer, wanted: DenseOutput, found: LayerCall) -> torch.Tensor:
    """Compute the difference between the dense outputs and those of the cut layer.

    For a layer whose output is added to a residual stream, this is the difference between the sums: the layer also
    corrects the error that earlier layers left in the stream.
    """
    target = wanted.output.to(found.output.device)
    if layer.factor is not None:
        target = target * layer.factor.view([-1 if at == layer.dim else 1 for at in range(target.ndim)])
    missing = target - found.output
    if found.stream is None or wanted.stream is None:
        return missing
    return missing + (wanted.stream.to(found.stream.device) - found.stream)


def _apply_change(pruned: IsoPruneForImageClassification, layer: FittedLayer, change: torch.Tensor) -> None:
    """Add the solution of a fit to weights and biases, in place: (G, F + 1, O), or only its last row."""
    module = layer.module
    has_weights = change.shape[1] > 1
    if has_weights and isinstance(module, nn.LayerNorm):
        scale = 1 + change[:, 0, 0]
        module.weight.copy_(module.weight * scale)
        if module.bias is not None:
            module.bias.copy_(module.bias * scale)
    elif has_weights:
        module.weight.add_(change[:, :-1].mT.reshape(module.weight.shape).to(module.weight.dtype))
    shift = change[:, -1].flatten()
    if module.bias is not None:
        module.bias.add_(shift.to(module.bias.dtype))
    elif layer.norm is not None:  # the BatchNorm subtracts its mean
        mean = pruned.model.get_buffer(f"{layer.norm}.running_mean")
        mean.sub_(shift.to(mean.dtype))
