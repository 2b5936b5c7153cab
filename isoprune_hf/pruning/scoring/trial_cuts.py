"""The divergence that cuts of single groups cause after a repair (`measure_trial_cuts`).

Nothing is cut: where a layer reads the removed channels, they are replaced by their prediction from the kept ones
(see `input_moments`), and where they are written as dims of an attention, by zero. The predictions are fitted to one
part of the images, and the divergence from the network as it is is measured on the other part. A trial starts at the
last waypoint before its cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models.divergence import Divergence
from isoprune_hf.models.held import objective_of
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.calibration.gradients import scoring_mode, sum_over_ranks
from isoprune_hf.pruning.calibration.inputs import read_tensor, replace_first_tensor
from isoprune_hf.pruning.partial_passes.observation import PassStopped
from isoprune_hf.pruning.partial_passes.passes import Passes
from isoprune_hf.pruning.partial_passes.storage import Storage
from isoprune_hf.pruning.scoring.gate_points import GatePoint
from isoprune_hf.pruning.scoring.input_moments import InputMoments, Prediction, channel_dim
from isoprune_hf.pruning.scoring.trial_choice import Trials, choose_trials
from isoprune_hf.pruning.scoring.trial_course import Course, find_course
from isoprune_hf.pruning.scoring.trial_images import TrialImages, count_held, split_images
from isoprune_hf.terminal import with_progress

_MAX_BYTES = 2**31  # of the moments of one pass
_JUDGING_BYTES = 2**30  # of the outputs from which trials start
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
    candidates: Mapping[str, Sequence[TrialCut]],
    calibration: Calibration,
) -> dict[str, list[tuple[TrialCut, float]]]:
    """Measure each cut by itself, as many as the budget of `choose_trials` allows.

    Args:
        model: Its objective compares probabilities. Restored afterwards.
        points: Points of `find_gate_points`.
        candidates: Group -> possible cuts, see `choose_trials`.
        calibration: Images; iterated over once.

    Returns:
        Group -> the cuts that were measured, with the mean divergence in nats; equal on all ranks. Empty if the
        outputs have no probabilities. A group has none if one of its weights is used without calling its layer, the
        input of a layer is too wide, or there is no image to set aside.
    """
    device, accelerator = model.device, calibration.accelerator
    compare = objective_of(model).divergence
    if compare is None:
        return {}
    with ExitStack() as stack:
        stack.enter_context(scoring_mode(model, requires_grad=False))
        stack.enter_context(torch.no_grad())
        course = find_course(model, points)
        measured = {name: cuts for name, cuts in candidates.items() if _is_measurable(model, course, name)}
        storage = Storage.of_ranks(device, accelerator)
        images = split_images(calibration, storage)
        shares = {name: course.share(name) for name in measured}
        trials = choose_trials(measured, shares, images=images.total, held=images.held)
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=calibration.precision == "bf16"))
        return _measure(model, course, trials, images, calibration, compare) if trials.judges else {}


def foretell_passes(
    model: IsoPruneForImageClassification,
    points: Sequence[GatePoint],
    candidates: Mapping[str, Sequence[object]],
    *,
    images: int,
    batch_size: int,
) -> float:
    """Return the passes over all images that `measure_trial_cuts` will take, in micro-batches of so many."""
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        course = find_course(model, points)
    measured = {name: cuts for name, cuts in candidates.items() if _is_measurable(model, course, name)}
    held = images // batch_size * count_held(batch_size) + count_held(images % batch_size)
    shares = {name: course.share(name) for name in measured}
    trials = choose_trials(measured, shares, images=images, held=held)
    last = min((shares[name] for name, cuts in trials.cuts.items() if cuts), default=1.0)
    judging = trials.passes + trials.judges * (2 - last)
    return (images - held + judging) / images if trials.judges else 0.0


def _is_measurable(model: IsoPruneForImageClassification, course: Course, group: str) -> bool:
    return course.is_called(group) and _moments_size(model, course.points.get(group, ())) <= _MAX_BYTES


def _moments_size(model: IsoPruneForImageClassification, points: Sequence[GatePoint]) -> int:
    """Return the bytes of the moments of the layers that read at some points."""
    return _FLOAT64_BYTES * sum((_input_width(model, point) + 1) ** 2 for point in points if not point.is_output)


def _input_width(model: IsoPruneForImageClassification, point: GatePoint) -> int:
    layer = model.model.get_submodule(point.layer)
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _measure(
    model: IsoPruneForImageClassification,
    course: Course,
    trials: Trials[TrialCut],
    images: TrialImages,
    calibration: Calibration,
    compare: Divergence,
) -> dict[str, list[tuple[TrialCut, float]]]:
    """Measure the chosen cuts, in the order of the network."""
    storage = Storage.of_ranks(model.device, calibration.accelerator)
    fitted = Passes(model, images.fitted, lambda: course.waypoints, storage)
    kept = replace(storage, always=_JUDGING_BYTES)  # few images; without them trials would start at the pixels
    judging = Passes(model, images.judging(trials.judges), lambda: course.waypoints, kept)
    wanted = [_logits(model, part) for part, _ in judging.batches()]
    cuts = [cut for name in course.in_order(trials.cuts) for cut in trials.cuts[name]]
    totals = torch.zeros(len(cuts), dtype=torch.float64, device=model.device)
    moments: dict[str, InputMoments] = {}
    ahead = _portions(model, course, trials.cuts)
    portion: set[str] = set()
    for number, cut in enumerate(with_progress(cuts, "trial cuts", "cut", rank=calibration.rank)):
        if cut.group not in portion:
            portion = next(ahead)
            moments = _observe(model, course, portion, fitted, calibration)
        judging.reach(course.first(cut.group))
        with _without(model, cut, course.points[cut.group], moments):
            for (pixels, begin), logits in zip(judging, wanted, strict=True):
                with begin():
                    totals[number] += compare(logits, _logits(model, pixels)).sum()
    judges = sum_over_ranks(torch.tensor(judging.images.count, device=model.device), calibration.accelerator)
    if not judges:
        return {}
    means = (sum_over_ranks(totals, calibration.accelerator) / judges).tolist()
    found: dict[str, list[tuple[TrialCut, float]]] = {}
    for cut, mean in zip(cuts, means, strict=True):
        found.setdefault(cut.group, []).append((cut, mean))
    return found


def _portions(
    model: IsoPruneForImageClassification, course: Course, cuts: Mapping[str, Sequence[TrialCut]]
) -> Iterator[set[str]]:
    """Yield names of groups that are cut and whose moments fit into memory together, in the order of the network."""
    portion: set[str] = set()
    used = 0
    for name in course.in_order(cuts):
        size = _moments_size(model, course.points[name]) if cuts[name] else 0
        if used + size > _MAX_BYTES:
            yield portion
            portion, used = set(), 0
        portion.add(name)
        used += size
    yield portion


def _observe(
    model: IsoPruneForImageClassification,
    course: Course,
    portion: set[str],
    passes: Passes,
    calibration: Calibration,
) -> dict[str, InputMoments]:
    """Return the moments of the inputs of the layers that read channels of some groups."""
    points = [point for name in portion for point in course.points[name] if not point.is_output]
    moments = {point.layer: InputMoments.empty(_input_width(model, point), model.device) for point in points}
    waiting = {name: course.calls[name] for name in moments}
    count = 0

    def on_call(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = read_tensor(args, kwargs)
        moments[name].add(x, channel_dim(layer, x), count)
        left[name] -= 1
        if not any(left.values()):
            raise PassStopped

    with ExitStack() as stack:
        for name in moments:
            layer = model.model.get_submodule(name)
            handle = layer.register_forward_pre_hook(partial(on_call, name), with_kwargs=True)
            stack.callback(handle.remove)
        through = iter(passes)
        if not course.is_first(portion):
            first = min((course.first(name) for name in portion), key=course.waypoints.starts.__getitem__)
            through = passes.through(first)
        for images, begin in through if moments else ():
            count, left = len(images), dict(waiting)
            with begin(), suppress(PassStopped):
                model(pixel_values=images)
    for found in moments.values():
        found.add_ranks(calibration.accelerator)
    return moments


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


def _logits(model: IsoPruneForImageClassification, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(pixel_values=images).logits
    return logits.double()
