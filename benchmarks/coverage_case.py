"""Run the steps of `coverage.py` for one model, and write a line of JSON for each finished step.

The base has random weights that keep all units active (`randomize`), BatchNorm statistics of real images, and labels
that are its own most likely classes, or of other tasks the targets that it draws. `default` prunes it by the preset
`best`, `plain` by the criterion `l1` without images; both to half of the MACs. The record of a model that does not
pass has the step and the error.
"""

import copy
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from coverage_images import pixels
from coverage_models import Case
from coverage_record import Record, require
from coverage_repair import MICRO_BATCH, check_repair, run
from helpers.oracles import (
    NotComparableError,
    difference,
    exact_logits,
    mask_error,
    permutation_error,
    prunable_share,
    randomize,
    rounding_error,
)
from PIL import Image
from transformers import PreTrainedModel

from isoprune_hf import BudgetError, IsoPruneForImageClassification, PruneRecipe, count_cost
from isoprune_hf.checkpoint.modeling_isoprune import model_class_of
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.models import BaseModel
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning.prune import PruneResult, prune_model

RECIPES = {
    "default": PruneRecipe(target_macs="50%"),
    "plain": PruneRecipe(criterion="l1", allocation="class", normalizer="none", max_ratio=1.0, target_macs="50%"),
}
IMAGES = 16  # for calibration, and as many held out
MORE_IMAGES = 112  # held out, too, for a repair that the first ones do not judge clearly
NUM_IMAGES = 2 * IMAGES + MORE_IMAGES
ORACLE_IMAGES = 2
PERMUTATION_TOLERANCE = 1e-9
# A larger change is rounding if the last bits of the weights change the output nearly as much, and it is below this.
MOST_ROUNDING = 1e-6
TIMES_ROUNDING = 10
MASK_TOLERANCE = 1e-6

Outputs = tuple[torch.Tensor, ...]


def prepare() -> None:
    """Set up a process that runs cases."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def open_case(case: Case, images: list[Image.Image], record: Record) -> tuple[BaseModel, torch.Tensor, Outputs]:
    """Open a base; return it with the images (NUM_IMAGES, 3, H, W) and its outputs of the first 2 * IMAGES."""
    record.add(step="load")
    with tempfile.TemporaryDirectory() as folder:
        base = case.open(Path(folder))
    model = base.model
    record.add(step="dense")
    values = pixels(images, base.processor)
    size = list(values.shape[1:])
    require(size == list(model.config.image_size), f"images of {size} for a model of {model.config.image_size}")
    randomize(model, images=values[:IMAGES])
    used = values[: 2 * IMAGES]
    outputs = run(model, used)
    if task_of(model.config.base).has_classes:
        shape = tuple(outputs[0].shape)
        require(shape == (len(used), model.config.num_labels), f"logits of shape {shape}")
    require(are_finite(outputs), "outputs that are not finite")
    require(are_equal(run(model, used), outputs), "outputs differ between two passes of the same images")
    record.add(params=sum(parameter.numel() for parameter in model.parameters()), side=size[-1])
    return base, values, outputs


def run_way(way: str, base: BaseModel, images: torch.Tensor, outputs: Outputs, record: Record) -> None:
    """Run all steps of one way of pruning."""
    model, recipe = base.model, RECIPES[way]
    images, more = images[: 2 * IMAGES], images[2 * IMAGES :]
    if way == "plain":
        use_eager_attention(model)  # the mask oracle follows its operations
        outputs = run(model, images)
    targets = targets_of(model, images[:IMAGES], outputs)
    batches = list(zip(images[:IMAGES].split(MICRO_BATCH), targets.split(MICRO_BATCH), strict=True))
    record.add(step="prune")
    try:
        result = prune_model(model, recipe, batches if recipe.reads_images else None)
    except BudgetError as error:  # the reason why half of the MACs cannot be removed
        record.add(over=" ".join(str(error).split())[:200])
        recipe = replace(recipe, target_macs=None)
        result = prune_model(model, recipe, batches if recipe.reads_images else None)
    report_result(model, result, record)
    check_result(model, result, recipe, record)
    held_out = images[IMAGES:]
    record.add(step="forward")
    found = run(result.model, held_out)
    shapes = [[tuple(value.shape[1:]) for value in values] for values in (found, outputs)]
    require(shapes[0] == shapes[1], f"outputs of shapes {shapes[0]}, and of the base {shapes[1]}")
    require(are_finite(found), "outputs that are not finite")
    record.add(step="reopen")
    reopen(result, base, held_out, found, eager=way == "plain")
    record.add(step="train")
    train(copy.deepcopy(result.model), *batches[0], [value[:MICRO_BATCH] for value in outputs])
    if way == "default":
        record.add(step="closer")
        check_repair(model, result, recipe, batches, (held_out, more), record)
    else:
        check_oracles(model, result, images[:ORACLE_IMAGES], record)
    record.add(step="done")


def targets_of(model: IsoPruneForImageClassification, images: torch.Tensor, outputs: Outputs) -> torch.Tensor:
    """Return the most likely classes of images, or the targets that a task without labels draws: (B, ...)."""
    if isinstance(model, HeldModel):
        return model.objective.draw_targets(images, [value.shape[1:] for value in outputs])
    return outputs[0][: len(images)].argmax(1)


def are_finite(outputs: Outputs) -> bool:
    return all(bool(value.isfinite().all()) for value in outputs)


def are_equal(outputs: Outputs, others: Outputs) -> bool:
    return all(torch.equal(*pair) for pair in zip(outputs, others, strict=True))


def report_result(model: IsoPruneForImageClassification, result: PruneResult, record: Record) -> None:
    """Write down the size of a cut, its time, and its notes."""
    record.add(
        groups=len(result.groups),
        share=round(prunable_share(model, result.groups), 4),
        macs=round(result.pruned_cost.macs / result.base_cost.macs, 4),
        kept=round(result.pruned_cost.params / result.base_cost.params, 4),
        seconds={stage: round(seconds, 1) for stage, seconds in result.seconds.items() if seconds >= 0.05},
    )
    if result.plan.notes:
        record.add(notes=len(result.plan.notes), note=result.plan.notes[0][:120])


def check_result(
    model: IsoPruneForImageClassification, result: PruneResult, recipe: PruneRecipe, record: Record
) -> None:
    """Check that the weights of a cut model are finite, and its recorded MACs those that it has."""
    record.add(step="finite")
    before = model.state_dict()
    for name, tensor in result.model.state_dict().items():
        fine = bool(tensor.isfinite().all()) or not bool(before[name].isfinite().all())
        require(fine, f"{name} is not finite")
    record.add(step="macs")
    counted, noted = count_cost(result.model), result.pruned_cost
    require((counted.macs, counted.params) == (noted.macs, noted.params), f"{noted} recorded, {counted} counted")
    params = sum(parameter.numel() for parameter in result.model.parameters())
    require(params == noted.params, f"{noted.params} parameters recorded, {params} counted")
    if recipe.target_macs is not None:
        require(
            2 * noted.macs <= result.base_cost.macs, f"{noted.macs / result.base_cost.macs:.3%} of the MACs remain"
        )


def reopen(result: PruneResult, base: BaseModel, images: torch.Tensor, outputs: Outputs, *, eager: bool) -> None:
    """Save a cut model, and check that the one opened from the folder has the same outputs, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "pruned", base.processor)
        again = model_class_of(result.model.config).from_pretrained(Path(folder) / "pruned")
    if eager:
        use_eager_attention(again)
    found = run(again, images)[-len(outputs) :]  # an encoder of timm returns the map before its pooling, too
    require(are_equal(found, outputs), "outputs of the reopened model differ")


def check_oracles(
    model: IsoPruneForImageClassification, result: PruneResult, images: torch.Tensor, record: Record
) -> None:
    """Check a plain cut with the two oracles in float64."""
    record.add(step="permutation")
    error = permutation_error(model, result.groups, images)
    record.add(permutation=float(f"{error:.1e}"))
    if PERMUTATION_TOLERANCE < error <= MOST_ROUNDING:
        rounding = rounding_error(model, images)
        record.add(rounding=float(f"{rounding:.1e}"))
        error = 0.0 if error <= TIMES_ROUNDING * rounding else error
    require(error <= PERMUTATION_TOLERANCE, f"the output changes by {error:.1e} when channels are permuted")
    record.add(step="mask")
    try:
        error = mask_error(model, result.model, result.groups, result.plan, images)
    except NotComparableError as reason:
        record.add(not_comparable=str(reason))
        return
    moved = difference(exact_logits(result.model, images), exact_logits(model, images))
    record.add(mask=float(f"{error:.1e}"), moved=float(f"{moved:.1e}"))
    require(error <= MASK_TOLERANCE, f"the cut model differs by {error:.1e} from the base with zeroed channels")


def use_eager_attention(model: IsoPruneForImageClassification) -> None:
    """Switch a model to eager attention, in place."""
    if isinstance(model.model, PreTrainedModel):
        model.model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def train(
    model: IsoPruneForImageClassification, images: torch.Tensor, labels: torch.Tensor, wanted: Sequence[torch.Tensor]
) -> None:
    """Take one step of SGD in train mode, in place, and check gradients and weights.

    Args:
        model: The model.
        images: (B, C, H, W).
        labels: The labels of a classifier.
        wanted: The outputs of the base, which teach a model of a task without labels.
    """
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    if isinstance(model, HeldModel):
        loss = model.objective.distances(model(images).outputs, wanted).mean()
    else:
        loss = model(images, labels=labels).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    require(bool(gradients), "no gradients")
    require(all(bool(gradient.isfinite().all()) for gradient in gradients), "gradients that are not finite")
    optimizer.step()
    require(all(bool(each.isfinite().all()) for each in model.parameters()), "weights that are not finite")
