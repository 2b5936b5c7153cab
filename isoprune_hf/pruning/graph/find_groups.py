"""The entry point of the engines: `trace_groups` finds the coupled groups of a model, `graph_of` its axis graph."""

from collections.abc import Iterable, Sequence
from typing import Literal

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.graph.axis_graph import AxisGraph, build_axis_graph
from isoprune_hf.pruning.graph.members import couple_axes
from isoprune_hf.pruning.graph.torch_pruning.depgraph import couple_nodes
from isoprune_hf.pruning.groups import CoupledGroup


class TracedGroups(tuple[CoupledGroup, ...]):
    """The groups of a model, together with its axis graph, so that later steps need not trace the model again."""

    graph: AxisGraph

    def __new__(cls, groups: Iterable[CoupledGroup], graph: AxisGraph) -> "TracedGroups":
        made = super().__new__(cls, groups)
        made.graph = graph
        return made

    def __reduce__(self) -> tuple[type["TracedGroups"], tuple[tuple[CoupledGroup, ...], AxisGraph]]:
        return TracedGroups, (tuple(self), self.graph)  # copies have a graph, too


def trace_groups(
    model: IsoPruneForImageClassification,
    signature: Literal["paper", "strict"] = "paper",
    engine: Literal["axes", "torch-pruning"] = "axes",
) -> TracedGroups:
    """Find the coupled groups of a model; leaves the model untouched.

    Args:
        model: A base or a pruned model on any device.
        signature: When two groups form one isomorphic class. Both signatures list the members of a group in the order
            of `named_modules`, which is the order of execution in most families.
            paper: Each entry is the type of a layer and the side that the channels are on: `out` (written, or passed
                on as by a norm), `in` (read) or `depthwise`; `Parameter` for a parameter that belongs to no layer.
                Kernel sizes and the way the members are connected make no difference.
            strict: The entry of a convolution also has its kernel size, stride and groups. After a `#` follow the
                edges between the entries: `2>5` means that channels flow from entry 2 to entry 5 (counted from 0) and
                pass only operations without parameters (sums, activations, concatenation).
        engine: axes traces every dim of every tensor through a forward pass; torch-pruning traces one dim of each node
            of autograd, and supports fewer architectures.

    Returns:
        Groups in the order of execution. The outputs of the network are never among them.

    Raises:
        UnsupportedArchitectureError: The model does not run, or the engine does not support a part of it.
    """
    base = model.model
    image_size = tuple(image_size_of(model))
    graph = build_axis_graph(base, image_size)
    if engine == "axes":
        return TracedGroups(couple_axes(graph, base, signature), graph)
    order = {name: position for position, (name, _) in enumerate(base.named_modules())}
    groups = couple_nodes(base, image_size, signature)
    return TracedGroups(sorted(groups, key=lambda group: order[group.name]), graph)


def graph_of(model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]) -> AxisGraph:
    """Return the axis graph of a model: that of its groups if they have one, else from a new trace."""
    if isinstance(groups, TracedGroups):
        return groups.graph
    return build_axis_graph(model.model, image_size_of(model))
