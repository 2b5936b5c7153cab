"""The divergence that cuts of single groups cause after a repair (`measure_trial_cuts`).

Nothing is cut: where a layer reads the removed channels, they are replaced by their prediction from the kept ones
(see `input_moments`), and where they are written as dims of an attention, by zero. The predictions are fitted to one
part of the images, and the divergence from the network as it is is measured on the other part.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration, finite_batches
from isoprune_hf.pruning.calibration.divergence import divergence_of
from isoprune_hf.pruning.calibration.gradients import scoring_mode, sum_over_ranks
from isoprune_hf.pruning.calibration.inputs import read_tensor, replace_first_tensor
from isoprune_hf.pruning.scoring.gate_points import GatePoint
from isoprune_hf.pruning.scoring.input_moments import InputMoments, Prediction, channel_dim
from isoprune_hf.recipes.values import Precision
from isoprune_hf.terminal import with_progress

_ONE_OF = 8  # images of each micro-batch judges the cuts
_IMAGES = 24  # that judge, about
_MAX_BYTES = 2**31  # of the moments of one pass
_FLOAT64_BYTES = 8


class TrialCut(NamedTuple):
    """A cut of one group.

    Args:
        group: Its name.
        removed: Channels, ascending.
    """

    group: str
    removed: np.ndarray


def measure_trial_cuts(
    model: IsoPruneForImageClassification,
    points: Sequence[GatePoint],
    cuts: Sequence[TrialCut],
    calibration: Calibration,
) -> list[float | None]:
    """Measure each cut by itself.

    Args:
        model: Its logits are those of classes. Restored afterwards.
        points: Points of `find_gate_points`.
        cuts: The cuts.
        calibration: Images, iterated over once for each 2 GiB of moments of inputs.

    Returns:
        For each cut the mean divergence in nats, equal on all ranks; None if it cannot be measured: a weight is used
        without calling its layer, its input is too wide, or there is no image to set aside.
    """
    by_group: dict[str, list[GatePoint]] = {}
    for point in points:
        by_group.setdefault(point.group, []).append(point)
    found: list[float | None] = [None] * len(cuts)
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        for names in _portions(model, by_group):
            numbers = [number for number, cut in enumerate(cuts) if cut.group in names]
            inside = [(cuts[number], by_group[cuts[number].group]) for number in numbers]
            for number, divergence in zip(numbers, _measure_portion(model, inside, calibration), strict=True):
                found[number] = divergence
    return found


def count_judges(images: int, batch_size: int) -> int:
    """Return about how many of so many images judge each cut, in micro-batches of so many."""
    batches = -(-images // batch_size)
    each = _count_held(min(images, batch_size))
    step = max(1, batches * each // _IMAGES)
    return min(-(-batches // step) * each, images)


def _portions(
    model: IsoPruneForImageClassification, by_group: Mapping[str, Sequence[GatePoint]]
) -> Iterator[set[str]]:
    """Yield names of groups whose moments fit into memory together."""
    portion: set[str] = set()
    used = 0
    for name, points in by_group.items():
        if not all(point.layer for point in points):
            continue
        widths = [_input_width(model, point) for point in points if not point.is_output]
        size = _FLOAT64_BYTES * sum((width + 1) ** 2 for width in widths)
        if size > _MAX_BYTES:
            continue
        if used + size > _MAX_BYTES:
            yield portion
            portion, used = set(), 0
        portion.add(name)
        used += size
    if portion:
        yield portion


def _input_width(model: IsoPruneForImageClassification, point: GatePoint) -> int:
    layer = model.model.get_submodule(point.layer)
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _measure_portion(
    model: IsoPruneForImageClassification,
    cuts: Sequence[tuple[TrialCut, Sequence[GatePoint]]],
    calibration: Calibration,
) -> list[float | None]:
    """Measure cuts of groups whose moments fit into memory."""
    moments, called, held = _observe(model, cuts, calibration)
    count = torch.tensor(sum(len(part) for part in held), device=model.device)
    images = sum_over_ranks(count, calibration.accelerator)
    if not images:
        return [None] * len(cuts)
    wanted = [_logits(model, part, calibration.precision) for part in held]
    totals = torch.zeros(len(cuts), dtype=torch.float64, device=model.device)
    for number, (cut, points) in enumerate(with_progress(cuts, "trial cuts", "cut", rank=calibration.rank)):
        if called.issuperset(point.layer for point in points):
            with _without(model, cut, points, moments):
                for part, logits in zip(held, wanted, strict=True):
                    totals[number] += divergence_of(logits, _logits(model, part, calibration.precision)).sum()
    means = (sum_over_ranks(totals, calibration.accelerator) / images).tolist()
    return [
        mean if called.issuperset(point.layer for point in points) else None
        for mean, (_, points) in zip(means, cuts, strict=True)
    ]


def _observe(
    model: IsoPruneForImageClassification,
    cuts: Sequence[tuple[TrialCut, Sequence[GatePoint]]],
    calibration: Calibration,
) -> tuple[dict[str, InputMoments], set[str], list[torch.Tensor]]:
    """Return the moments of the layers that read, all layers that are called, and the images that judge."""
    points = [point for _, used in cuts for point in used]
    moments = {
        point.layer: InputMoments.empty(_input_width(model, point), model.device)
        for point in points
        if not point.is_output
    }
    called: set[str] = set()
    count = 0

    def on_call(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.add(name)
        if name in moments:
            x = read_tensor(args, kwargs)
            moments[name].add(x, channel_dim(layer, x), count)

    handles = [
        model.model.get_submodule(name).register_forward_pre_hook(partial(on_call, name), with_kwargs=True)
        for name in dict.fromkeys(point.layer for point in points)
    ]
    held: list[tuple[int, torch.Tensor]] = []
    processes = 1 if calibration.accelerator is None else calibration.accelerator.num_processes
    try:
        for number, (images, _) in enumerate(finite_batches(calibration.batches)):
            count = len(images) - _count_held(len(images))
            held.append((number * processes + calibration.rank, images[count:]))
            if count:
                _logits(model, images[:count], calibration.precision)
    finally:
        for handle in handles:
            handle.remove()
    for found in moments.values():
        found.add_ranks(calibration.accelerator)
    total = sum(len(part) for _, part in held)
    total = int(sum_over_ranks(torch.tensor(total, device=model.device), calibration.accelerator))
    step = max(1, total // _IMAGES)  # the same micro-batches judge however many ranks share them
    return moments, called, [part for number, part in held if number % step == 0 and len(part)]


def _count_held(images: int) -> int:
    """Return how many of the images of a micro-batch judge: the last ones."""
    return max(images // _ONE_OF, int(images > 1))


@contextmanager
def _without(
    model: IsoPruneForImageClassification,
    cut: TrialCut,
    points: Sequence[GatePoint],
    moments: Mapping[str, InputMoments],
) -> Iterator[None]:
    """Replace the removed channels at all points of a group within the context."""

    def predict(prediction: Prediction, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = read_tensor(args, kwargs)
        return replace_first_tensor(args, kwargs, prediction.replace(x, channel_dim(layer, x)))

    def clear(removed: torch.Tensor, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(channel_dim(layer, output), removed, 0.0)

    handles = []
    for point in points:
        layer = model.model.get_submodule(point.layer)
        is_removed = np.isin(np.arange(len(point.places)), cut.removed)
        kept, removed = (
            torch.from_numpy(point.places[mask].ravel()).to(model.device) for mask in (~is_removed, is_removed)
        )
        if point.is_output:
            handles.append(layer.register_forward_hook(partial(clear, removed)))
        else:
            hook = partial(predict, moments[point.layer].predict(kept, removed))
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: IsoPruneForImageClassification, images: torch.Tensor, precision: Precision) -> torch.Tensor:
    device = model.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        logits: torch.Tensor = model(pixel_values=images.to(model.device)).logits
    return logits.double()
