"""Coupled groups: which channels can only leave together, by the engine that the recipe names."""

from collections.abc import Iterable, Sequence
from typing import Literal

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.graph.axis_graph import AxisGraph, follow_axes
from isoprune_hf.pruning.graph.members import couple_axes
from isoprune_hf.pruning.graph.torch_pruning.depgraph import couple_nodes
from isoprune_hf.pruning.groups import CoupledGroup


class TracedGroups(tuple[CoupledGroup, ...]):
    """The groups of a model, with the axis graph of the same model: what needs it later need not trace again."""

    graph: AxisGraph

    def __new__(cls, groups: Iterable[CoupledGroup], graph: AxisGraph) -> "TracedGroups":
        made = super().__new__(cls, groups)
        made.graph = graph
        return made


def trace_groups(
    model: IsoPruneForImageClassification,
    signature: Literal["paper", "strict"] = "paper",
    engine: Literal["axes", "torch-pruning"] = "axes",
) -> TracedGroups:
    """Find the coupled groups of a model; leaves the model untouched.

    Args:
        model: A base or a pruned model on any device.
        signature: When two groups are of one isomorphic class. Both signatures list the members of a group in the
            order of `named_modules`, which is that of execution in most families.
            paper: Each entry is the type of a layer and the side that the channels are on: `out` (written, or kept
                as by a norm), `in` (read) or `depthwise`; `Parameter` for a parameter that no layer owns. Sizes of
                kernels and the way the members are joined make no difference.
            strict: Each entry of a convolution has its kernel size, stride and groups, too, and behind a `#` stand the
                edges between the entries: `2>5` where the channels flow from entry 2 to entry 5 (counted from 0)
                through operations without parameters alone; these (sums, activations, concatenation) are contracted.
        engine: axes follows every dim of every tensor through a forward pass; torch-pruning follows the nodes of
            autograd by one dim each, and supports fewer architectures.

    Returns:
        Groups in the order of execution. The outputs of the classifier are never among them.

    Raises:
        UnsupportedArchitectureError: The model does not run, or the engine does not know a part of it.
    """
    base = model.model
    graph = follow_axes(base, model.config.image_size)
    if engine == "axes":
        return TracedGroups(couple_axes(graph, base, signature), graph)
    order = {name: position for position, (name, _) in enumerate(base.named_modules())}
    groups = couple_nodes(base, tuple(model.config.image_size), signature)
    return TracedGroups(sorted(groups, key=lambda group: order[group.name]), graph)


def graph_of(model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]) -> AxisGraph:
    """The axis graph of a model: the one that its groups came with, else traced anew."""
    return groups.graph if isinstance(groups, TracedGroups) else follow_axes(model.model, model.config.image_size)
