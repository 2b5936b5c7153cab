"""Describe in sentences how a model was pruned; call `describe_decision`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isoprune_hf.recipes import DATA_CRITERIA

_PAPER = "[Isomorphic Pruning](https://arxiv.org/abs/2407.04616)"
CRITERION_TEXTS = {
    "gate_fisher": "the loss that removing the channel alone costs, from squared gradients on images",
    "gate_fisher_joint": "the loss that removing the channel costs together with all cheaper ones of its group, from "
    "products of gradients on images",
    "trial_loss": "the loss that removing the channel costs after a repair, together with all cheaper ones of its "
    "group, from trial cuts of each group on images",
    "taylor": "the first-order change of the loss without its weights, summed, from gradients on images",
    "taylor_l2": "the first-order change of the loss without its weights, as a norm, from gradients on images",
    "taylor_reference": "the first-order change of the loss without its weights, as torch-pruning computes it",
    "hessian": "the second-order change of the loss without its weights, from squared gradients on images",
    "hessian_reference": "the second-order change of the loss without its weights, as torch-pruning computes it",
    "activation_variance": "the variance of its activations on images",
    "l1": "the sum of its absolute weights",
    "l2": "the Euclidean norm of its weights",
    "bn_scale": "the scales of its BatchNorm layers",
    "fpgm": "the distance of its filter to all other filters of its layer",
    "lamp": "its share in the norm of all channels that are at least as large",
    "random": "a random number",
}
REPAIR_TEXTS = {
    "none": "Nothing was repaired after the cut.",
    "bn": "After the cut, the statistics of BatchNorm were measured anew; no weight was trained.",
    "bias": "After the cut, the biases of each layer were set so that its mean outputs are those of the base; no "
    "weight was trained.",
    "least_squares": "After the cut, each layer was fitted to the outputs of the base by least squares, without "
    "training.",
}
_SCOPE_TEXTS = {
    "isomorphic": "Channels are ranked only within their isomorphic class, because scores of different classes are on "
    "different scales.",
    "global": "The channels of all layers are ranked together.",
    "local": "Channels are ranked only within their own group.",
}
_UNITS = {"target_params": "parameter", "target_latency": "millisecond"}


@dataclass(frozen=True)
class DecisionText:
    """How a model was pruned.

    Args:
        is_isomorphic: The channels competed within isomorphic classes, as in the paper.
        method: The method as the end of "pruned with".
        sentences: Competition, scores, images and repair, one sentence each; what is not recorded is left out.
    """

    is_isomorphic: bool
    method: str
    sentences: tuple[str, ...]


def describe_decision(recipe: Mapping[str, Any], plan: Mapping[str, Any], split: str | None) -> DecisionText:
    """Describe a decision by its settings.

    Args:
        recipe: Settings of the section `prune`.
        plan: Settings of the plan, which replace them: those of the scores that were used.
        split: Split that the images for scoring were taken from, if it is known.
    """
    settings = {**recipe, **plan}
    # A recipe leaves its allocation open until it is settled; folders of earlier versions do not name it.
    is_known = bool(settings) and settings.get("allocation", "class") is not None
    is_knapsack = settings.get("allocation") == "knapsack"
    scope = settings.get("scope") or "isomorphic"
    is_isomorphic = is_known and not is_knapsack and scope == "isomorphic" and not settings.get("scopes")
    if is_isomorphic:
        method = _PAPER
    elif is_knapsack:
        method = "structured pruning (allocation `knapsack`)"
    elif is_known:
        method = f"structured pruning ({'custom scopes' if settings.get('scopes') else f'scope `{scope}`'})"
    else:
        method = "structured pruning"
    sentences = (
        _describe_competition(settings, scope, is_knapsack=is_knapsack) if is_known else "",
        _describe_scores(settings),
        _describe_images(settings, split) if settings else "",
        "Before scoring, attention heads were rotated so that few dims carry most of their products."
        if settings.get("rotate")
        else "",
        REPAIR_TEXTS.get(settings.get("reconstruct") or "", ""),
        f"The cut was made in {settings['steps']} steps, each with new scores."
        if settings.get("steps", 1) != 1
        else "",
    )
    return DecisionText(is_isomorphic, method, tuple(filter(None, sentences)))


def _describe_competition(settings: Mapping[str, Any], scope: str, *, is_knapsack: bool) -> str:
    if is_knapsack:
        unit = next((_UNITS[name] for name in _UNITS if settings.get(name) is not None), "MAC")
        return f"The channels of all classes compete by the loss that their removal costs for each saved {unit}."
    others = " Groups that `scopes` names are ranked in scopes of their own." if settings.get("scopes") else ""
    return _SCOPE_TEXTS.get(scope, "") + others


def _describe_scores(settings: Mapping[str, Any]) -> str:
    criterion = settings.get("criterion")
    if criterion is None:
        return ""
    known = CRITERION_TEXTS.get(criterion)
    return f"The score of a channel is {known} (criterion `{criterion}`)." if known else f"Criterion: `{criterion}`."


def _describe_images(settings: Mapping[str, Any], split: str | None) -> str:
    uses = ["the scores"] if settings.get("criterion") in DATA_CRITERIA else []
    uses += ["the rotation"] if settings.get("rotate") else []
    uses += ["the repair"] if settings.get("reconstruct") not in (None, "none") else []
    if not uses:
        return "No images were used: the scores follow from the weights." if settings.get("criterion") else ""
    batches, size = settings.get("calibration_batches"), settings.get("batch_size")
    sample = settings.get("sample")
    counted = sample.get("images") if isinstance(sample, Mapping) else None
    if type(counted) is int:
        number = f"{counted:,} images"
    elif type(batches) is int and type(size) is int:
        number = f"{batches} micro-batches of {size} images (at most {batches * size:,} images)"
    else:
        return ""
    source = f" of split `{split}`" if split else ""
    together = f"{', '.join(uses[:-1])} and {uses[-1]}" if len(uses) > 1 else uses[0]
    return f"For {together} {number}{source} were used."
