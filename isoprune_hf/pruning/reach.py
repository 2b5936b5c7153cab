"""Describe which part of a base the coupled groups reach, and why the other dims are fixed: call `describe_reach`."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.cost.macs import Term, cost_model
from isoprune_hf.pruning.graph.axis import is_frozen, reason_of
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.find_groups import graph_of
from isoprune_hf.pruning.graph.layers import ConvNd
from isoprune_hf.pruning.groups import CoupledGroup

_MAX_NAMES = 6  # listed for each reason


def describe_reach(dense: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]) -> list[str]:
    """Describe the share of a base that groups reach, and the fixed dims of its parameters by reason.

    Args:
        dense: The base; its weights are not read.
        groups: Groups of `trace_groups(dense)`.
    """
    cost = cost_model(dense, groups)
    dims = {
        (member.parameter, member.dim)
        for group in groups
        for member in (*group.members, *group.head_members, *group.dim_members)
    }
    macs, params = _reached_size(cost.products), _reached_size(cost.parameters)
    share = f"{macs / cost.base.macs:.1%} of the MACs and {params / cost.base.params:.1%} of the params"
    alone = sum(not any(width.ties for width in term.widths) for term in cost.parameters)
    lines = [
        f"{share} of the base lie in layers that groups reach; {alone} of {len(cost.parameters)} parameters in none"
    ]
    for reason, names in _fixed_dims(dense, dims, graph_of(dense, groups)).items():
        shown = [name if count == 1 else f"{name} ({count})" for name, count in names.items()]
        more = len(shown) - _MAX_NAMES
        lines.append(f"fixed: {reason}: {', '.join(shown[:_MAX_NAMES])}{f' and {more} more' if more > 0 else ''}")
    return lines


def _reached_size(terms: Iterable[Term]) -> int:
    """Sum the terms (MACs of products, elements of parameters) with a width that depends on a group."""
    return sum(
        math.prod(width.size for width in term.widths) for term in terms if any(width.ties for width in term.widths)
    )


def _fixed_dims(
    dense: IsoPruneForImageClassification, dims: set[tuple[str, int]], graph: AxisGraph
) -> dict[str, Counter[str]]:
    """Find the dims of parameters in no group: reason -> parameter name with `*` for its numbers -> count."""
    found: dict[str, Counter[str]] = {}
    covered = {name for name, _ in dims}
    for name, parameter in dense.model.named_parameters():
        owner = dense.model.get_submodule(name.rpartition(".")[0])
        # The dims after the first two of a convolution's weight are its kernel.
        channel_dims = min(parameter.ndim, 2) if isinstance(owner, ConvNd) else parameter.ndim
        fixed = [dim for dim in range(channel_dims) if parameter.shape[dim] > 1 and (name, dim) not in dims]
        for dim in fixed:
            reason = _known_reason(dense, name, owner, dim)
            if reason is None:
                reason = _traced_reason(graph, name, dim, is_covered=name in covered)
            found.setdefault(reason, Counter())[re.sub(r"\d+", "*", name)] += 1
    return found


def _known_reason(dense: IsoPruneForImageClassification, name: str, owner: nn.Module, dim: int) -> str | None:
    """Return the reason why a dim is fixed, if its name or layer tells."""
    if dim == 0 and getattr(owner, "out_features", getattr(owner, "out_channels", 0)) == dense.config.num_labels:
        return "outputs of the network"
    if isinstance(owner, ConvNd) and dim == 1:
        if owner.in_channels == image_size_of(dense)[0]:
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
    """Return the reason why the trace froze a dim."""
    axes = graph.trace.tensors.get(name)
    if axes is None:
        return "nothing reads it"
    if is_frozen(axes[dim]):
        return reason_of(axes[dim])
    return "another dim of a layer that a group reaches" if is_covered else "no group was found for it"
