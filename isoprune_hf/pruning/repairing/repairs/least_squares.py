"""`least_squares`: bring the outputs of every layer nearest to those of the dense one."""

from collections.abc import Sequence

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.graph.copying import copy_modules, replace_tensor
from isoprune_hf.pruning.graph.layers import BatchNorm
from isoprune_hf.pruning.repairing.fit_layers import fit_layers
from isoprune_hf.pruning.repairing.judging import NEGLIGIBLE, Judge, Judgement, judge, split_images
from isoprune_hf.pruning.repairing.logit_scale import scale_logits
from isoprune_hf.pruning.repairing.repairs.batchnorm import recalibrate_batchnorm
from isoprune_hf.pruning.repairing.repairs.task import RepairTask
from isoprune_hf.pruning.repairing.trials import Trial

State = dict[str, torch.Tensor]
Folds = tuple[tuple[Calibration, Calibration], ...]


class LeastSquaresRepair:
    """Fit weights and biases of layers (see `fit_layers`), unless a simpler repair does better.

    Part of the images is held out, or each half in turn if there are few. The fit, new statistics of BatchNorm and the
    cut as it is are compared with the dense network on these images, and the nearest one is kept, with all images; its
    logits are scaled around their mean to match. The fits to one part and to all are made layer by layer side by side.

    Source:
        He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, without the ridge.
    """

    name = "least_squares"
    reads_images = True

    def repair(self, task: RepairTask) -> tuple[str, ...]:
        """Repair `task.pruned`, in place."""
        folds = split_images(task.calibration, task.dense.device)
        judges = [Judge(task.dense, task.pruned, held) for _, held in folds]
        if not all(each.images for each in judges):
            return _fit(task, task.calibration, None)
        before = _state(task.pruned)
        found = {"none": judge([each.compare(task.pruned) for each in judges], is_repaired=False)}
        if any(isinstance(module, BatchNorm) for module in task.pruned.modules()):
            found["bn"] = _judge_batchnorm(task, folds, judges, before)
        notes, found["least_squares"] = _fit_and_judge(task, folds, judges)
        images = sum(each.images for each in judges)
        is_few = len(folds) > 1
        choices = [
            name for name in reversed(found) if not is_few or _holds_for_few(found[name], found["none"], images)
        ]
        best = min(choices, key=lambda name: max(found[name].divergence, NEGLIGIBLE))
        if best != "least_squares":
            _restore(task.pruned, before)
            notes = (_describe_choice(best, found, images),)
        if best == "bn":
            notes += recalibrate_batchnorm(task.pruned, task.calibration)
        if not scale_logits(task.pruned, found[best].scale, found[best].center):
            notes += (
                f"the logits are not scaled by {found[best].scale:.3g}: no single layer with a bias computes them",
            )
        return notes


def _holds_for_few(repaired: Judgement, cut: Judgement, images: int) -> bool:
    """Return whether a repair is also nearer for most of few images, and its outputs in the mean of their squares.

    The mean of few divergences depends on the largest, and hardly on the logits of classes that are improbable. Both
    are of the outputs at scale 1: those of a network that nothing resembles come nearer when they shrink.
    """
    return 2 * repaired.nearer > images and repaired.distance <= cut.distance


def _judge_batchnorm(task: RepairTask, folds: Folds, judges: Sequence[Judge], before: State) -> Judgement:
    """Judge new statistics of BatchNorm; `task.pruned` is as before at the end."""
    parts = []
    for (fitted, _), each in zip(folds, judges, strict=True):
        recalibrate_batchnorm(task.pruned, fitted)
        parts.append(each.compare(task.pruned))
        _restore(task.pruned, before)
    return judge(parts)


def _fit_and_judge(task: RepairTask, folds: Folds, judges: Sequence[Judge]) -> tuple[tuple[str, ...], Judgement]:
    """Fit `task.pruned` to all images, in place, and judge fits without the images of each fold."""
    copies = [copy_modules(task.pruned, lambda tensor: replace_tensor(tensor, tensor.detach().clone())) for _ in folds]
    fitted, held = folds[0]
    notes = _fit(task, fitted, Trial(copies[0], held.batches, *copies[1:]))
    return notes, judge([each.compare(network) for each, network in zip(judges, copies, strict=True)])


def _fit(task: RepairTask, calibration: Calibration, trial: Trial | None) -> tuple[str, ...]:
    return fit_layers(
        task.dense,
        task.pruned,
        task.masks,
        calibration,
        outputs=task.outputs,
        factors=task.factors,
        trial=trial,
        selecting=task.selecting,
    )


def _state(model: IsoPruneForImageClassification) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _restore(model: IsoPruneForImageClassification, state: State) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])


def _describe_choice(best: str, found: dict[str, Judgement], images: int) -> str:
    values = ", ".join(
        f"{name} {judgement.divergence:.3g}" + (f" and nearer for {judgement.nearer}" if name != "none" else "")
        for name, judgement in found.items()
    )
    is_least = all(found[best].divergence <= judgement.divergence for judgement in found.values())
    reason = (
        "it is nearest to the dense model"
        if is_least
        else "no other is nearer to the dense model for most of them and in the mean square of its outputs"
    )
    return (
        f"prune.reconstruct {best} is used instead of least_squares: on {images} images that no repair saw, {reason} "
        f"(divergence: {values})"
    )
