"""Whether a pruned model is sound: what it records is true, what it is can be made again, and what a cut can reach."""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForImageClassification, BaseImageProcessor

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.errors import IsoPruneError, UnsupportedArchitectureError
from isoprune_hf.pruning.cost.macs import CostModel, cost_model, count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.cutting.uniform import to_stock
from isoprune_hf.pruning.graph.axis import is_frozen, reason_of
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.find_groups import graph_of, trace_groups
from isoprune_hf.pruning.graph.layers import ConvNd
from isoprune_hf.pruning.plan import PruningPlan

_IMAGES = 2
_MOST_NAMES = 6


class Finding(NamedTuple):
    """What one check has found.

    Args:
        check: Name of the check.
        verdict: ok, FAIL, or skip where it could not be made.
        text: Its figure, or the reason.
    """

    check: str
    verdict: Literal["ok", "FAIL", "skip"]
    text: str


def check_model(
    model: IsoPruneForImageClassification, processor: BaseImageProcessor, plan: PruningPlan | None
) -> list[Finding]:
    """Check all that needs no weights of the base.

    Args:
        model: The model of a folder, in eval mode; left untouched.
        processor: Its image processor.
        plan: Its plan, where it has one.
    """
    findings = []
    for check, look in (
        ("cost", lambda: _check_cost(model)),
        ("structure", lambda: _check_structure(model, plan)),
        ("no-op", lambda: _check_no_op(model)),
        ("save-load", lambda: _check_round_trip(model, processor)),
        ("reach", lambda: _check_reach(model)),
    ):
        try:
            findings.append(look())
        except (IsoPruneError, OSError) as error:
            findings.append(Finding(check, "FAIL", " ".join(str(error).split())))
    return findings


def check_replay(
    model: IsoPruneForImageClassification, base: IsoPruneForImageClassification, plan: PruningPlan
) -> Finding:
    """Check that every tensor of a model that was not trained since its cut is the base's, where the plan keeps it.

    Args:
        model: The pruned model.
        base: The dense base with its weights.
        plan: What stays.
    """
    changed = changed_after_cut(plan)
    if changed is not None:
        return Finding("tensors", "skip", changed)
    if fingerprint(base.model) != plan.fingerprint:
        return Finding("tensors", "skip", "the plan was made on other weights than those of the base")
    try:
        expected = apply_plan(base, plan)
        expected = (to_stock(expected) if _is_uniform(model) else expected).model.state_dict()
    except IsoPruneError as error:
        return Finding("tensors", "FAIL", str(error))
    different = _first_difference(model.model.state_dict(), expected)
    if different:
        return Finding("tensors", "FAIL", f"{different} is not that of the base where the plan keeps it")
    return Finding("tensors", "ok", f"{len(expected)} tensors are those of the base, bit for bit")


def changed_after_cut(plan: PruningPlan) -> str | None:
    """Say why the weights of a model are not those of the base where the plan keeps them."""
    steps = {"rotate": plan.settings.get("rotate"), "reconstruct": plan.settings.get("reconstruct", "none") != "none"}
    made = " and ".join(f"prune.{name}" for name, is_made in steps.items() if is_made)
    return f"{made} changed the weights that the plan keeps, as it records" if made else None


def _check_cost(model: IsoPruneForImageClassification) -> Finding:
    if model.config.cost is None:
        return Finding("cost", "skip", "the config records none")
    # A uniform layout does not lead back to its base.
    base = model.config.cost["base"] if _is_uniform(model) else count_cost(meta_copy(model, dense=True)).to_dict()
    now = {"base": base, "pruned": count_cost(model).to_dict()}
    if model.config.cost != now:
        return Finding("cost", "FAIL", f"config.cost is {model.config.cost}, counted anew it is {now}")
    macs, params = (f"{now['pruned'][key] / now['base'][key]:.1%}" for key in ("macs", "params"))
    return Finding("cost", "ok", f"{macs} of the base's MACs and {params} of its params, as recorded")


def _check_structure(model: IsoPruneForImageClassification, plan: PruningPlan | None) -> Finding:
    if plan is None:
        return Finding("structure", "skip", "there is no plan to compare it with")
    if _is_uniform(model):
        return _check_sizes(model, plan)
    if (model.config.source or {}).get("fingerprint") != plan.fingerprint:
        # The plan speaks of a model that was cut before: only the widths it leaves can be compared.
        return _check_widths(model, plan)
    made = apply_plan(meta_copy(model, dense=True), plan).config.structure
    have = model.config.structure or {}
    for kind in ("shapes", "attributes"):
        first, second = have.get(kind) or {}, made[kind]
        for name in sorted(first.keys() | second.keys()):
            if first.get(name) != second.get(name):
                where = f"config.structure.{kind}[{name!r}]"
                return Finding(
                    "structure", "FAIL", f"{where} is {first.get(name)}, by the plan it is {second.get(name)}"
                )
    if set(have.get("removed") or []) != set(made["removed"]):
        return Finding("structure", "FAIL", f"the plan removes {made['removed']}, config.structure.removed differs")
    numbers = sum(map(len, made["attributes"].values()))
    return Finding("structure", "ok", f"the plan gives its {len(made['shapes'])} shapes and {numbers} attributes")


def _check_widths(model: IsoPruneForImageClassification, plan: PruningPlan) -> Finding:
    groups = {group.name: group for group in trace_groups(model)}
    for name, kept in plan.kept.items():
        if name.startswith(tuple(f"{block}." for block in plan.removed_blocks)):
            continue
        group, heads = groups.get(name), len(plan.heads.get(name, ()))
        if group is None or (group.channels, group.num_heads) != (len(kept), heads):
            have = "none" if group is None else f"{group.channels} channels and {group.num_heads} heads"
            text = f"the plan keeps {len(kept)} channels and {heads} heads of {name}, the model has {have}"
            return Finding("structure", "FAIL", text)
    text = f"the widths of {len(plan.kept)} groups are those of the plan, which speaks of a model cut before"
    return Finding("structure", "ok", text)


def _check_sizes(model: IsoPruneForImageClassification, plan: PruningPlan) -> Finding:
    """Check the sizes of a stock config against what the plan keeps of the attentions and of the other groups."""
    config = model.model.config
    attention = (config.num_attention_heads, config.head_dim)
    for name, kept in plan.kept.items():
        heads = len(plan.heads.get(name, ()))
        if name.startswith(tuple(f"{block}." for block in plan.removed_blocks)):
            continue
        if heads and (heads, len(kept) // heads) != attention:
            text = f"the plan keeps {heads} heads of {len(kept) // heads} dims in {name}, the config has {attention}"
            return Finding("structure", "FAIL", text)
        if not heads and len(kept) not in (config.hidden_size, config.intermediate_size):
            return Finding("structure", "FAIL", f"the plan keeps {len(kept)} channels of {name}, a size of no layer")
    return Finding("structure", "ok", f"the widths of {len(plan.kept)} groups are the sizes of the stock config")


def _is_uniform(model: IsoPruneForImageClassification) -> bool:
    return model.config.layout == "uniform"


def _check_no_op(model: IsoPruneForImageClassification) -> Finding:
    groups = trace_groups(model)
    everything = PruningPlan(
        kept={group.name: tuple(range(group.channels)) for group in groups},
        heads={group.name: tuple(range(group.num_heads)) for group in groups if group.num_heads},
    )
    same = torch.equal(_logits(apply_plan(model, everything, groups)), _logits(model))
    text = f"a plan that keeps all of {len(groups)} groups "
    return Finding("no-op", "ok" if same else "FAIL", text + ("changes no logit" if same else "changes the logits"))


def _check_round_trip(model: IsoPruneForImageClassification, processor: BaseImageProcessor) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        save_model_folder(Path(folder) / "model", model, processor)
        if _is_uniform(model):
            again = meta_copy(model)  # the same wrapper around what stock code opens
            again.model = AutoModelForImageClassification.from_pretrained(Path(folder) / "model")
        else:
            again = IsoPruneForImageClassification.from_pretrained(Path(folder) / "model")
        different = _first_difference(again.model.state_dict(), model.model.state_dict())
        if different is None and not torch.equal(_logits(again), _logits(model)):
            different = "the logits"
    if different:
        return Finding("save-load", "FAIL", f"{different} came back different")
    return Finding("save-load", "ok", f"tensors and the logits of {_IMAGES} images come back bit for bit")


def _check_reach(model: IsoPruneForImageClassification) -> Finding:
    dense = meta_copy(model, dense=True)
    groups = trace_groups(dense)
    cost = cost_model(dense, groups)
    dims = {
        (member.parameter, member.dim)
        for group in groups
        for member in (*group.members, *group.head_members, *group.dim_members)
    }
    macs, params = _reached(cost)
    share = f"{macs / cost.base.macs:.1%} of the MACs and {params / cost.base.params:.1%} of the params"
    alone = sum(not any(width.ties for width in term.widths) for term in cost.parameters)
    lines = [
        f"{share} of the base lie in layers that groups reach; {alone} of {len(cost.parameters)} parameters in none"
    ]
    for reason, names in _fixed_dims(dense, dims, graph_of(dense, groups)).items():
        shown = [name if count == 1 else f"{name} ({count})" for name, count in names.items()]
        more = len(shown) - _MOST_NAMES
        lines.append(f"fixed: {reason}: {', '.join(shown[:_MOST_NAMES])}{f' and {more} more' if more > 0 else ''}")
    return Finding("reach", "ok" if groups else "FAIL", "\n".join(lines))


def _reached(cost: CostModel) -> tuple[int, int]:
    """MACs and elements of the parameters that groups reach."""
    macs, params = (
        sum(
            math.prod(width.size for width in term.widths)
            for term in terms
            if any(width.ties for width in term.widths)
        )
        for terms in (cost.products, cost.parameters)
    )
    return macs, params


def _fixed_dims(
    dense: IsoPruneForImageClassification, dims: set[tuple[str, int]], graph: AxisGraph
) -> dict[str, Counter[str]]:
    """Dims of parameters that lie in no group: reason -> name with its numbers left out -> how many."""
    found: dict[str, Counter[str]] = {}
    covered = {name for name, _ in dims}
    for name, parameter in dense.model.named_parameters():
        owner = dense.model.get_submodule(name.rpartition(".")[0])
        # Behind the first two dims of a convolution's weight lies its kernel.
        channel_dims = min(parameter.ndim, 2) if isinstance(owner, ConvNd) else parameter.ndim
        fixed = [dim for dim in range(channel_dims) if parameter.shape[dim] > 1 and (name, dim) not in dims]
        for dim in fixed:
            reason = _reason(dense, name, owner, dim) or _traced_reason(graph, name, dim, is_covered=name in covered)
            found.setdefault(reason, Counter())[re.sub(r"\d+", "*", name)] += 1
    return found


def _reason(dense: IsoPruneForImageClassification, name: str, owner: nn.Module, dim: int) -> str | None:
    if dim == 0 and getattr(owner, "out_features", getattr(owner, "out_channels", 0)) == dense.config.num_labels:
        return "outputs of the classifier"
    if isinstance(owner, ConvNd) and dim == 1:
        if owner.in_channels == dense.config.image_size[0]:
            return "colours of the image"
        if owner.groups > 1:
            return "channels inside one group of a convolution"
    leaf = name.rpartition(".")[2]
    if "relative_position" in name:
        return "relative positions in a window"
    if "pos" in leaf:
        return "positions of tokens"
    return None


def _traced_reason(graph: AxisGraph, name: str, dim: int, *, is_covered: bool) -> str:
    """Why the trace has frozen a dim."""
    axes = graph.trace.tensors.get(name)
    if axes is None:
        return "nothing reads it"
    if is_frozen(axes[dim]):
        return reason_of(axes[dim])
    return "another dim of a layer that a group reaches" if is_covered else "no group was found for it"


def _first_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that is not the same bit for bit, in its own dtype."""
    for name in [*second, *(name for name in first if name not in second)]:
        if name not in first or name not in second or _bits(first[name]) != _bits(second[name]):
            return name
    return None


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, Iterable[int], bytes]:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), content


def _logits(model: IsoPruneForImageClassification) -> torch.Tensor:
    pixels = torch.randn(_IMAGES, *model.config.image_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            return model(pixels.to(model.device)).logits
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedArchitectureError(f"the model does not run: {error}") from error
