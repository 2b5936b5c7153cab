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
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.graph.copying import blank_image, copy_modules, light_copy
from isoprune_hf.pruning.graph.find_groups import graph_of
from isoprune_hf.pruning.graph.widths import Tie, Width, leaf_ties, widths_of
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.plan import PruningPlan


@dataclass(frozen=True)
class ModelCost:
    """Size of a model.

    Args:
        macs: Multiply-accumulates for one image, counted by `torch.utils.flop_counter`: all matrix products and
            convolutions, both products of attention included; additions, norms and activations are not.
        params: Parameters.
    """

    macs: int
    params: int

    def to_dict(self) -> dict[str, int]:
        """Return plain values for JSON."""
        return asdict(self)


def count_cost(model: IsoPruneForImageClassification, image_size: Sequence[int] | None = None) -> ModelCost:
    """Count multiply-accumulates and parameters on the meta device; the model's weights are not read.

    Args:
        model: A base or pruned model.
        image_size: (channels, height, width) of the image; the default is the model's own.

    Raises:
        UnsupportedArchitectureError: The architecture does not run: a cut has broken it.
    """
    image_size = image_size or model.config.image_size
    try:
        counter = _run_counter(light_copy(model.model), image_size)
    except UnsupportedArchitectureError as error:
        if model.device.type == "meta" or "meta" not in str(error).lower():
            raise  # else it is a forward pass that reads values
        counter = _run_counter(copy_modules(model.model, torch.Tensor.detach, with_hooks=False), image_size)
    return ModelCost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))


def _run_counter(network: nn.Module, image_size: Sequence[int]) -> FlopCounterMode:
    example = blank_image(network, image_size)
    network = network.eval().requires_grad_(False)  # else the counter looks for gradients
    counter = FlopCounterMode(display=False)
    # The math backend spells attention out as two products; the fused kernels have no meta implementation to count.
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            network(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedArchitectureError(f"{type(network).__name__} does not run: {error}") from error
    return counter


class RemovedUnits(NamedTuple):
    """What a cut removes, in the order in which `CostModel.cost` takes it.

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
        module: Path of the module that has it.
        widths: The factors.
    """

    module: str
    widths: tuple[Width, ...]


@dataclass(frozen=True, eq=False)
class CostModel:
    """Cost of any plan as a function of widths, equal to `count_cost` of the finished model.

    Args:
        base: Cost of the dense model.
        products: Matrix products and convolutions.
        parameters: Parameters.
        groups: Group -> (channels, heads), heads 0 where it is no attention.
        blocks: Paths of the residual blocks that may leave.
    """

    base: ModelCost
    products: Sequence[Term]
    parameters: Sequence[Term]
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    blocks: Sequence[str] = ()

    def cost(
        self, removed: Mapping[str, int], removed_heads: Mapping[str, int], removed_blocks: Iterable[str] = ()
    ) -> ModelCost:
        """Cost after a cut.

        Args:
            removed: Group -> channels that leave.
            removed_heads: Attention group -> whole heads that leave (their channels are counted in `removed` too).
            removed_blocks: Residual blocks that leave whole.
        """
        macs, params = self._values(removed, removed_heads, removed_blocks)
        return ModelCost(int(macs.sum()), int(params.sum()))

    def layer_macs(
        self, removed: Mapping[str, int], removed_heads: Mapping[str, int], removed_blocks: Iterable[str] = ()
    ) -> dict[str, int]:
        """MACs of every layer after a cut: module -> MACs; an attention module stands for its two products."""
        macs, _ = self._values(removed, removed_heads, removed_blocks)
        found = dict.fromkeys((term.module for term in self.products), 0)
        for term, count in zip(self.products, macs.tolist(), strict=True):
            found[term.module] += count
        return found

    @cached_property
    def _arrays(self) -> "_CostArrays":
        order = {name: position for position, name in enumerate(self.groups)}
        units = {"channel": 0, "head": len(order), "dim": 2 * len(order)}
        rows: dict[Width, int] = {Width(1): 0}
        terms = [*self.products, *self.parameters]
        for term in terms:
            for width in term.widths:
                rows.setdefault(width, len(rows))
        ties = [
            (row, units[tie.unit] + order[tie.group], tie.elements)
            for width, row in rows.items()
            for tie in width.ties
        ]
        longest = max((len(term.widths) for term in terms), default=0)
        factors = np.zeros((len(terms), longest), dtype=np.int64)
        for at, term in enumerate(terms):
            factors[at, : len(term.widths)] = [rows[width] for width in term.widths]
        columns = np.array(ties, dtype=np.int64).reshape(-1, 3).T
        inside = {
            block: np.array([f"{term.module}.".startswith(f"{block}.") for term in terms]) for block in self.blocks
        }
        counts = np.array(list(self.groups.values()), dtype=np.int64).reshape(-1, 2).T
        return _CostArrays(np.array([width.size for width in rows]), *columns, factors, inside, *counts)

    def _values(
        self, removed: Mapping[str, int], removed_heads: Mapping[str, int], removed_blocks: Iterable[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """MACs of every product and elements of every parameter after a cut."""
        arrays = self._arrays
        channels = np.array([removed.get(group, 0) for group in self.groups], dtype=np.int64)
        heads = np.array([removed_heads.get(group, 0) for group in self.groups], dtype=np.int64)
        dims = arrays.channels // np.maximum(arrays.heads, 1)
        dims = dims - (arrays.channels - channels) // np.maximum(arrays.heads - heads, 1)
        sizes = arrays.sizes.copy()
        leaving = np.concatenate([channels, heads, dims])
        np.subtract.at(sizes, arrays.rows, arrays.elements * leaving[arrays.units])
        values = sizes[arrays.factors].prod(axis=1)
        for block in removed_blocks:
            values[arrays.inside[block]] = 0
        return values[: len(self.products)], values[len(self.products) :]


class _CostArrays(NamedTuple):
    """The terms of a cost model as arrays: rows are different widths, entries their ties."""

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
    """Write down what every channel and every block costs, from the matrix products of one forward pass.

    Raises:
        UnsupportedArchitectureError: MACs cannot be attributed to widths.
    """
    graph = graph_of(model, groups)
    ties = leaf_ties(graph, groups)
    products = []
    for product in graph.trace.products:
        widths = [widths_of(axis, ties) for axis in product.sizes]
        if None in widths:
            raise UnsupportedArchitectureError(
                f"the MACs of {product.module or 'the model'} do not follow from widths"
            )
        products.append(Term(product.module, tuple(width for factor in widths for width in factor)))
    parameters = _parameters(model.model, groups)
    counts = {group.name: (group.channels, group.num_heads) for group in groups}
    unknown = CostModel(ModelCost(0, 0), products, parameters, counts, [block.name for block in blocks])
    return replace(unknown, base=unknown.cost({}, {}))


def _parameters(network: nn.Module, groups: Sequence[CoupledGroup]) -> list[Term]:
    ties: dict[tuple[str, int], list[Tie]] = {}
    for group in groups:
        kinds = (("channel", group.members), ("head", group.head_members), ("dim", group.dim_members))
        for unit, members in kinds:
            for member in members:
                tie = Tie(group.name, member.index.shape[1], unit)
                ties.setdefault((member.parameter, member.dim), []).append(tie)
    return [
        Term(
            name.rpartition(".")[0],
            tuple(Width(size, tuple(ties.get((name, dim), ()))) for dim, size in enumerate(parameter.shape)),
        )
        for name, parameter in network.named_parameters()
    ]
