"""Repair a cut model without training (`repair`) by the repair that was requested."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Calibration, finite_batches
from isoprune_hf.pruning.cutting.cut import keep_masks
from isoprune_hf.pruning.graph.find_groups import graph_of
from isoprune_hf.pruning.graph.output_masks import output_masks
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.partial_passes.storage import Storage
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.repairs.registry import REPAIRS
from isoprune_hf.pruning.repairing.repairs.task import RepairTask
from isoprune_hf.pruning.repairing.rotation import Rotated
from isoprune_hf.terminal import with_progress


def repair(
    rotated: Rotated,
    pruned: IsoPruneForImageClassification,
    plan: PruningPlan,
    groups: Sequence[CoupledGroup],
    name: str,
    calibration: Calibration | None = None,
    *,
    factors: Mapping[str, torch.Tensor] | None = None,
) -> tuple[str, ...]:
    """Repair a cut model, in place.

    Args:
        rotated: The model that was cut, with the heads that were rotated before.
        pruned: The cut model.
        plan: What was kept.
        groups: Groups of the base.
        name: The repair: a key of `REPAIRS`.
        calibration: Images, for repairs that read them; iterated over once.
        factors: Those of `keep_scale`.

    Returns:
        One line for each thing that could not be repaired.

    Raises:
        RecipeError: The repair reads images, and there is none.
    """
    method = REPAIRS[name]
    if not method.reads_images or not (plan.kept or plan.removed_blocks):
        return ()
    if calibration is None:
        raise RecipeError("prune.reconstruct needs data: set --data.dataset, or remove the setting")
    storage = Storage.of_ranks(pruned.device, calibration.accelerator)
    batches = with_progress(calibration.batches, "repair, images", "batch", rank=calibration.rank)
    held = [(storage.hold(images), labels) for images, labels in finite_batches(batches)]
    names = _names_of_tensors(rotated.model.model)
    kept = keep_masks(plan, groups, rotated.model.model)
    masks = {(name, dim): mask for (first, dim), mask in kept.items() for name in names[first]}
    by_name = {name: factor for first, factor in (factors or {}).items() for name in names[first]}
    graph = graph_of(rotated.model, groups)
    outputs = output_masks(graph, kept)
    selecting = frozenset(decision.module for decision in graph.trace.decisions if decision.module)
    calibration = replace(calibration, batches=held)
    return method.repair(RepairTask(rotated.model, pruned, masks, by_name, calibration, outputs, selecting))


def _names_of_tensors(base: nn.Module) -> dict[str, list[str]]:
    """Return each name of a parameter or buffer -> all names of the same tensor."""
    tensors = [*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False)]
    by_id: dict[int, list[str]] = {}
    for name, tensor in tensors:
        by_id.setdefault(id(tensor), []).append(name)
    return {name: by_id[id(tensor)] for name, tensor in tensors}
