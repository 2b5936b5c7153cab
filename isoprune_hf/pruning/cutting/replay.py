"""Cut a base to a plan that was saved: call `replay_plan`."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import is_cut
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.cutting.uniform import to_stock
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan

logger = logging.getLogger(__name__)


def replay_plan(
    model: IsoPruneForImageClassification, plan: PruningPlan, *, ignore_fingerprint: bool = False
) -> tuple[IsoPruneForImageClassification, PruningPlan]:
    """Cut a copy of a base to a plan that was made earlier.

    Args:
        model: The base; left untouched.
        plan: A plan of this base, or of another one with the same groups.
        ignore_fingerprint: Also accept a plan that was made on other weights.

    Returns:
        The pruned model, and the plan with the costs and the fingerprint of this base. For the base of an unedited
        plan both are equal to those of the first cut, bit for bit.

    Raises:
        CheckpointError: The plan belongs to other weights or to rotated heads, or does not fit the model.
    """
    if plan.settings.get("rotate"):
        raise CheckpointError(
            "pruning plan: it was made on rotated heads, whose dims are not those of the base; prune again with the "
            "recipe that made it (prune.rotate needs its calibration images)"
        )
    if plan.settings.get("reconstruct", "none") != "none":
        logger.warning(
            f"the model of this plan was repaired after the cut (prune.reconstruct {plan.settings['reconstruct']}); "
            "the repair needs images and is not repeated here"
        )
    found = fingerprint(model.model)
    if plan.fingerprint != found and not ignore_fingerprint:
        raise CheckpointError(
            f"pruning plan: it was made on other weights (fingerprint {_short(plan.fingerprint)}) than those of this "
            f"base ({_short(found)}); open the base that it was made on, or set --ignore_fingerprint true"
        )
    groups = trace_groups(model)
    pruned = apply_plan(model, plan, groups)
    if not is_cut(model.config):  # the source of a cut model names its own base
        record_base(pruned.config, found)
    cost: Mapping[str, Mapping[str, float]] = pruned.config.cost or {}
    known = {name: {key: plan.achieved.get(name, {}).get(key) for key in figures} for name, figures in cost.items()}
    if plan.settings.get("layout") == "uniform":
        pruned = to_stock(pruned)
    return pruned, replace(plan, fingerprint=found, achieved=plan.achieved if known == cost else cost)


def record_base(config: IsoPruneConfig, found: str) -> None:
    """Record the fingerprint of the base that was cut in a config, in place, and whether it was trained before.

    Args:
        config: Config of a cut model, with the source of its base.
        found: Fingerprint of the base.
    """
    source = config.source or {}
    changed = {"changed": True} if source.get("fingerprint") not in (None, found) else {}
    config.source = {**source, **changed, "fingerprint": found}


def _short(digest: str) -> str:
    return digest[:12] or "none"
