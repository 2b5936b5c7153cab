"""The replay of a plan on a base."""

import logging
from dataclasses import replace

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
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
    """Cut a copy of a base to a plan that was made before.

    Args:
        model: The base; left untouched.
        plan: Of this or another base.
        ignore_fingerprint: Cut other weights than those the plan was made on, too.

    Returns:
        The pruned model, and the plan with the costs and the fingerprint of this base. On the base it was made on,
        a plan that nobody edited comes back as it is, and the tensors are the same bit for bit.

    Raises:
        CheckpointError: The plan is of other weights or of turned heads, or does not fit the model.
    """
    if plan.settings.get("rotate"):
        raise CheckpointError(
            "pruning plan: it was decided on rotated heads, whose dims are not those of the base; cut anew with the "
            "recipe that made it (prune.rotate needs its calibration images)"
        )
    if plan.settings.get("reconstruct", "none") != "none":
        logger.warning(
            f"the plan's model was repaired after the cut (prune.reconstruct {plan.settings['reconstruct']}), which "
            "needs images: this is the cut alone"
        )
    found = fingerprint(model.model)
    if plan.fingerprint != found and not ignore_fingerprint:
        raise CheckpointError(
            f"pruning plan: it was made on other weights (fingerprint {_short(plan.fingerprint)}) than those of this "
            f"base ({_short(found)}); open the base that it was made on, or go on with --ignore_fingerprint true"
        )
    groups = trace_groups(model)
    pruned = apply_plan(model, plan, groups)
    if not is_cut(model.config):  # else the source names a base before this one
        pruned.config.source = {**(pruned.config.source or {}), "fingerprint": found}
    cost = pruned.config.cost
    known = {name: {key: plan.achieved.get(name, {}).get(key) for key in figures} for name, figures in cost.items()}
    if plan.settings.get("layout") == "uniform":
        pruned = to_stock(pruned)
    return pruned, replace(plan, fingerprint=found, achieved=plan.achieved if known == cost else cost)


def _short(digest: str) -> str:
    return digest[:12] or "none"
