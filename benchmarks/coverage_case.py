"""Run the steps of `coverage.py` for one model, and print a line of JSON for each finished step.

The record of a failing model is the last step that was announced and the error that ended the process.
"""

import copy
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from coverage_models import population
from helpers.oracles import (
    NotComparableError,
    difference,
    exact_logits,
    make_images,
    mask_error,
    permutation_error,
    prunable_share,
    randomize,
)
from timm.layers import set_fused_attn
from transformers import PreTrainedModel

from isoprune_hf import (
    IsoPruneForImageClassification,
    PruneRecipe,
    PruningPlan,
    apply_plan,
    count_cost,
    make_plan,
    score_groups,
    trace_groups,
)
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.pruning.groups import CoupledGroup

MAX_KEPT_SHARE = 0.65  # of the parameters
PERMUTATION_TOLERANCE = 1e-9
MASK_TOLERANCE = 1e-6


class FailedError(Exception):
    """Raised when the result of a step is wrong."""


def require(holds: bool, message: str) -> None:
    """Raise a FailedError unless the condition holds."""
    if not holds:
        raise FailedError(message)


def report(**values: Any) -> None:
    """Write one line of the record."""
    print(json.dumps(values), flush=True)


def run_case(name: str) -> None:
    """Run all steps for one model."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    set_fused_attn(False)
    case = next(case for case in population() if case.name == name)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        report(step="load")
        base = case.open(place / "config")
        model = base.model
        use_eager_attention(model)
        randomize(model)
        images = make_images(model)
        logits = run(model, images)
        require(logits.shape == (2, model.config.num_labels), f"logits of shape {tuple(logits.shape)}")
        require(bool(logits.isfinite().all()), "logits that are not finite")
        require(torch.equal(run(model, images), logits), "logits differ between two passes of the same images")
        report(
            params=sum(parameter.numel() for parameter in model.parameters()),
            signal=difference(logits[:1], logits[1:]),
        )
        report(step="dense round trip")
        save_model_folder(place / "dense", model, base.processor)
        require(torch.equal(run(reload(place / "dense"), images), logits), "logits of the reloaded base differ")

        report(step="trace")
        start = time.process_time()
        groups = trace_groups(model)
        report(trace_s=round(time.process_time() - start, 3), groups=len(groups), share=prunable_share(model, groups))
        report(step="permutation")
        error = permutation_error(model, groups, images)
        report(permutation=error)
        require(error <= PERMUTATION_TOLERANCE, f"the output changes by {error:.1e} when channels are permuted")

        report(step="ratio 0")
        plan, untouched = cut(model, groups, PruneRecipe(criterion="l1", ratio=0.0))
        require(not plan.kept, "groups are pruned at ratio 0")
        before = model.state_dict()
        require(untouched.state_dict().keys() == before.keys(), "names of tensors differ at ratio 0")
        for name, tensor in untouched.state_dict().items():
            require(torch.equal(tensor, before[name]), f"{name} is changed at ratio 0")
        require(torch.equal(run(untouched, images), logits), "logits differ at ratio 0")
        del untouched, before

        report(step="cut")
        plan, pruned = cut(model, groups, PruneRecipe(criterion="l1", ratio=0.5, round_to=8))
        share = count_cost(pruned).params / count_cost(model).params
        report(kept=share)
        report(step="forward")
        cut_logits = run(pruned, images)
        require(cut_logits.shape == logits.shape, f"logits of shape {tuple(cut_logits.shape)}")
        require(bool(cut_logits.isfinite().all()), "logits that are not finite")
        report(step="reload")
        save_model_folder(place / "pruned", pruned, base.processor, plan=plan.to_json())
        require(torch.equal(run(reload(place / "pruned"), images), cut_logits), "logits of the reloaded model differ")
        report(step="train")
        train(copy.deepcopy(pruned), images)
        report(step="mask")
        try:
            error = mask_error(model, pruned, groups, plan, images)
        except NotComparableError as reason:
            report(mask=None, not_comparable=str(reason))
        else:
            report(mask=error, moved=difference(exact_logits(pruned, images), exact_logits(model, images)))
            require(
                error <= MASK_TOLERANCE, f"the pruned model differs by {error:.1e} from the base with zeroed channels"
            )
        report(step="size")
        require(share <= MAX_KEPT_SHARE, f"{share:.0%} of the parameters were kept")
        report(step="done")


def use_eager_attention(model: IsoPruneForImageClassification) -> None:
    """Switch a transformers model to eager attention, in place."""
    if isinstance(model.model, PreTrainedModel):
        model.model.set_attn_implementation("eager")


def run(model: IsoPruneForImageClassification, images: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, num_labels)."""
    with torch.no_grad():
        return model(images).logits


def reload(folder: Path) -> IsoPruneForImageClassification:
    """Open a folder as a user would."""
    model = IsoPruneForImageClassification.from_pretrained(folder)
    use_eager_attention(model)
    return model


def cut(
    model: IsoPruneForImageClassification, groups: tuple[CoupledGroup, ...], recipe: PruneRecipe
) -> tuple[PruningPlan, IsoPruneForImageClassification]:
    """Score, plan and prune; return the plan and the pruned model."""
    scores = score_groups(model, groups, criterion=recipe.criterion)
    plan = make_plan(groups, scores, recipe)
    return plan, apply_plan(model, plan, groups)


def train(model: IsoPruneForImageClassification, images: torch.Tensor) -> None:
    """Run one backward pass in train mode, in place, and check the gradients."""
    model.train().requires_grad_(True)
    loss = model(images, labels=torch.tensor([0, 1])).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    require(bool(gradients), "no gradients")
    require(all(bool(gradient.isfinite().all()) for gradient in gradients), "gradients that are not finite")
