"""Exact multiply-accumulates and parameters: of a model (`count_cost`), and of any cut of it (`cost_model`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.copying import blank_image, copy_modules, copy_simplified
from isoprune_hf.pruning.graph.find_groups import graph_of
from isoprune_hf.pruning.graph.widths import Tie, Unit, Width, leaf_ties, widths_of
from isoprune_hf.pruning.groups import CoupledGroup, Member, ResidualBlock
from isoprune_hf.pruning.plan import PruningPlan


@dataclass(frozen=True)
class ModelCost:
    """MACs and parameters of a model.

    Args:
        macs: Multiply-accumulates for one image, counted by `torch.utils.flop_counter`: all matrix products and
            convolutions, including both products of attention; additions, norms and activations do not count.
        params: Parameters.
    """

    macs: int
    params: int

    def to_dict(self) -> dict[str, int]:
        """Return plain values for JSON."""
        return asdict(self)


def count_cost(model: IsoPruneForImageClassification, image_size: Sequence[int] | None = None) -> ModelCost:
    """Count multiply-accumulates and parameters on the meta device, without reading weights.

    Args:
        model: A base or pruned model.
        image_size: (channels, height, width) of the image; by default that of the model.

    Raises:
        UnsupportedArchitectureError: The forward pass fails, as after a cut that does not fit the architecture.
    """
    size = image_size or image_size_of(model)
    try:
        counter = _run_counter(copy_simplified(model.model), size)
    except UnsupportedArchitectureError as error:
        # A forward pass that reads values fails on the meta device; torch has no error type for that, but names the
        # device in the message.
        if model.device.type == "meta" or "meta" not in str(error).lower():
            raise
        counter = _run_counter(copy_modules(model.model, torch.Tensor.detach, with_hooks=False), size)
    return ModelCost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))


def _run_counter(network: nn.Module, image_size: Sequence[int]) -> FlopCounterMode:
    example = blank_image(network, image_size)
    network = network.eval().requires_grad_(False)  # with gradients the counter expects a backward pass
    counter = FlopCounterMode(display=False)
    # The math backend computes attention as two products; the fused kernels have no meta implementation to count.
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            network(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedArchitectureError(f"{type(network).__name__} does not run: {error}") from error
    return counter


class RemovedUnits(NamedTuple):
    """The channels, heads and blocks that a cut removes, in the order of the arguments of `CostModel.cost`.

    Args:
        channels: Group -> channels to remove.
        heads: Attention group -> whole heads to remove (their channels are counted in `channels` too).
        blocks: Residual blocks to remove.
    """

    channels: Mapping[str, int]
    heads: Mapping[str, int]
    blocks: tuple[str, ...]

    @classmethod
    def of_plan(cls, plan: PruningPlan, groups: Sequence[CoupledGroup]) -> "RemovedUnits":
        """Return what a plan removes from the model of these groups."""
        channels = {g.name: g.channels - len(plan.kept.get(g.name, range(g.channels))) for g in groups}
        heads = {g.name: g.num_heads - len(plan.heads.get(g.name, range(g.num_heads))) for g in groups}
        return cls(channels, heads, plan.removed_blocks)


class Term(NamedTuple):
    """A product of sizes: elements of a parameter, or multiply-accumulates of a matrix product.

    Args:
        module: Path of the module that owns the parameter or computes the product.
        widths: The factors.
    """

    module: str
    widths: tuple[Width, ...]


@dataclass(frozen=True, eq=False)
class CostModel:
    """Cost of any cut as a function of widths; equal to `count_cost` of the cut model.

    Args:
        base: Cost of the dense model.
        products: Matrix products and convolutions.
        parameters: Parameters.
        groups: Group -> (channels, heads); 0 heads for groups other than attention.
        blocks: Paths of the residual blocks that may be removed.
    """

    base: ModelCost
    products: Sequence[Term]
    parameters: Sequence[Term]
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    blocks: Sequence[str] = ()

    def cost(
        self, removed: Mapping[str, int], removed_heads: Mapping[str, int], removed_blocks: Iterable[str] = ()
    ) -> ModelCost:
        """Compute the cost after a cut; see `RemovedUnits` for the arguments."""
        macs, params = self._values(RemovedUnits(removed, removed_heads, tuple(removed_blocks)))
        return ModelCost(int(macs.sum()), int(params.sum()))

    def layer_macs(
        self,
        removed: Mapping[str, int],
        removed_heads: Mapping[str, int],
        removed_blocks: Iterable[str] = (),
        *,
        multiple: int = 1,
    ) -> dict[str, int]:
        """Compute module -> MACs after a cut; the entry of an attention module is that of its two products.

        With `multiple`, widths that a cut may change count as the next multiple of it: kernels that compute channels
        in blocks need as long for a part of a block.
        """
        macs, _ = self._values(RemovedUnits(removed, removed_heads, tuple(removed_blocks)), multiple)
        found = dict.fromkeys((term.module for term in self.products), 0)
        for term, count in zip(self.products, macs.tolist(), strict=True):
            found[term.module] += count
        return found

    @cached_property
    def _arrays(self) -> "_CostArrays":
        order = {name: position for position, name in enumerate(self.groups)}
        offsets = {"channel": 0, "head": len(order), "dim": 2 * len(order)}
        rows: dict[Width, int] = {Width(1): 0}
        terms = [*self.products, *self.parameters]
        for term in terms:
            for width in term.widths:
                rows.setdefault(width, len(rows))
        ties = [
            (row, offsets[tie.unit] + order[tie.group], tie.elements)
            for width, row in rows.items()
            for tie in width.ties
        ]
        longest = max((len(term.widths) for term in terms), default=0)
        factors = np.zeros((len(terms), longest), dtype=np.int64)
        for position, term in enumerate(terms):
            factors[position, : len(term.widths)] = [rows[width] for width in term.widths]
        tie_rows, units, elements = np.array(ties, dtype=np.int64).reshape(-1, 3).T
        inside = {
            block: np.array([f"{term.module}.".startswith(f"{block}.") for term in terms]) for block in self.blocks
        }
        channels, heads = np.array(list(self.groups.values()), dtype=np.int64).reshape(-1, 2).T
        return _CostArrays(
            sizes=np.array([width.size for width in rows]),
            rows=tie_rows,
            units=units,
            elements=elements,
            factors=factors,
            inside=inside,
            channels=channels,
            heads=heads,
        )

    def _values(self, removed: RemovedUnits, multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Compute the MACs of every product and the elements of every parameter after a cut."""
        arrays = self._arrays
        channels = np.array([removed.channels.get(group, 0) for group in self.groups], dtype=np.int64)
        heads = np.array([removed.heads.get(group, 0) for group in self.groups], dtype=np.int64)
        dims = arrays.channels // np.maximum(arrays.heads, 1)
        dims = dims - (arrays.channels - channels) // np.maximum(arrays.heads - heads, 1)
        sizes = arrays.sizes.copy()
        removed_units = np.concatenate([channels, heads, dims])
        np.subtract.at(sizes, arrays.rows, arrays.elements * removed_units[arrays.units])
        if multiple > 1:
            tied = np.unique(arrays.rows)
            sizes[tied] = -(-sizes[tied] // multiple) * multiple
        values = sizes[arrays.factors].prod(axis=1)
        for block in removed.blocks:
            values[arrays.inside[block]] = 0
        return values[: len(self.products)], values[len(self.products) :]


class _CostArrays(NamedTuple):
    """The terms of a cost model as arrays.

    Args:
        sizes: Distinct widths, (rows,); row 0 has the size 1.
        rows: Row of each tie, (ties,).
        units: Position of the tied unit in the concatenated counts of channels, heads and dims, (ties,).
        elements: Elements removed with each unit, (ties,).
        factors: Rows of the factors of each term, (terms, longest), padded with row 0.
        inside: Block -> terms inside it, (terms,).
        channels: Channels of each group, (groups,).
        heads: Heads of each group, (groups,).
    """

    sizes: np.ndarray
    rows: np.ndarray
    units: np.ndarray
    elements: np.ndarray
    factors: np.ndarray
    inside: dict[str, np.ndarray]
    channels: np.ndarray
    heads: np.ndarray


def cost_model(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup], blocks: Sequence[ResidualBlock] = ()
) -> CostModel:
    """Build the cost model of a model from the matrix products of one forward pass.

    Args:
        model: The base.
        groups: Groups of `trace_groups(model)`.
        blocks: Residual blocks that may be removed.

    Raises:
        UnsupportedArchitectureError: The MACs of a product are not a function of widths.
    """
    graph = graph_of(model, groups)
    ties = leaf_ties(graph, groups)
    products = []
    for product in graph.trace.matrix_products:
        widths: list[Width] = []
        for axis in product.sizes:
            factors = widths_of(axis, ties)
            if factors is None:
                raise UnsupportedArchitectureError(
                    f"the MACs of {product.module or 'the model'} are not a function of widths"
                )
            widths += factors
        products.append(Term(product.module, tuple(widths)))
    parameters = _parameters(model.model, groups, _train_only_widths(graph, ties))
    counts = {group.name: (group.channels, group.num_heads) for group in groups}
    without_base = CostModel(ModelCost(0, 0), products, parameters, counts, [block.name for block in blocks])
    return replace(without_base, base=without_base.cost({}, {}))


def _train_only_widths(graph: AxisGraph, ties: Mapping[int, Tie]) -> dict[str, tuple[Width, ...]]:
    """Return the widths of the tensors that only train mode reads: they are cut, but are members of no group."""
    found: dict[str, tuple[Width, ...]] = {}
    for name in graph.trace.train_only:
        factors = [widths_of(axis, ties) for axis in graph.trace.tensors[name]]
        known = [widths for widths in factors if widths is not None]
        if len(known) == len(factors):
            found[name] = tuple(width for widths in known for width in widths)
    return found


def _parameters(
    network: nn.Module, groups: Sequence[CoupledGroup], known: Mapping[str, tuple[Width, ...]]
) -> list[Term]:
    """Write the elements of every parameter as a product of widths, some of which are known."""
    ties: dict[tuple[str, int], list[Tie]] = {}
    for group in groups:
        members_by_unit: dict[Unit, tuple[Member, ...]] = {
            "channel": group.members,
            "head": group.head_members,
            "dim": group.dim_members,
        }
        for unit, members in members_by_unit.items():
            for member in members:
                tie = Tie(group.name, member.index.shape[1], unit)
                ties.setdefault((member.parameter, member.dim), []).append(tie)
    return [
        Term(
            name.rpartition(".")[0],
            known.get(name)
            or tuple(Width(size, tuple(ties.get((name, dim), ()))) for dim, size in enumerate(parameter.shape)),
        )
        for name, parameter in network.named_parameters()
    ]
