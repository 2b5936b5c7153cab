"""How big a model is, and how big a plan would make it: exact multiply-accumulates and parameters."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.tracing import light_copy


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
    counter = _run_counter(light_copy(model.model), image_size or model.config.image_size)
    return ModelCost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))


def _run_counter(network: nn.Module, image_size: Sequence[int]) -> FlopCounterMode:
    example = torch.zeros(1, *image_size, device="meta")
    counter = FlopCounterMode(display=False)
    # The math backend spells attention out as two products; the fused kernels have no meta implementation to count.
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            network(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedArchitectureError(f"{type(network).__name__} does not run: {error}") from error
    return counter


@dataclass(frozen=True, eq=False)
class CostModel:
    """Cost of any plan as a function of widths, equal to `count_cost` of the finished model.

    MACs of a layer are (positions it is applied to) x (elements of its weight); those of attention are proportional to
    its width.

    Args:
        base: Cost of the dense model.
        constant: MACs that no plan changes.
        positions: Weight -> MACs for each of its elements.
        attention: Group -> MACs for each of its channels, in the two products of attention.
        shapes: Parameter -> its dense shape.
        ties: Parameter -> (dim, group, elements on that dim for each channel, whole heads only).
        channels: Attention group -> channels.
        blocks: Residual block -> its parameters.
    """

    base: ModelCost
    constant: int
    positions: Mapping[str, int]
    attention: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, tuple[tuple[int, str, int, bool], ...]] = field(default_factory=dict)
    channels: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def cost(
        self, removed: Mapping[str, int], removed_heads: Mapping[str, int], removed_blocks: Iterable[str] = ()
    ) -> ModelCost:
        """Cost after a cut.

        Args:
            removed: Group -> channels that leave.
            removed_heads: Attention group -> whole heads that leave (their channels are counted in `removed` too).
            removed_blocks: Residual blocks that leave whole.
        """
        elements = self._elements(removed, removed_heads, removed_blocks)
        products = self._products(removed, removed_blocks)
        macs = self.constant + int(elements @ self._arrays.positions) + sum(products.values())
        return ModelCost(macs, int(elements.sum()))

    def layer_macs(
        self, removed: Mapping[str, int], removed_heads: Mapping[str, int], removed_blocks: Iterable[str] = ()
    ) -> dict[str, int]:
        """MACs of every layer after a cut: module -> MACs; an attention module stands for its two products."""
        macs = self._elements(removed, removed_heads, removed_blocks) * self._arrays.positions
        layers = zip(self.shapes, macs.tolist(), strict=True)
        weights = {name.removesuffix(".weight"): count for name, count in layers if name in self.positions}
        return weights | self._products(removed, removed_blocks)

    @cached_property
    def _arrays(self) -> "_CostArrays":
        rows = {name: row for row, name in enumerate(self.shapes)}
        widest = max((len(shape) for shape in self.shapes.values()), default=0)
        sizes = np.ones((len(rows), widest), dtype=np.int64)
        for name, shape in self.shapes.items():
            sizes[rows[name], : len(shape)] = shape
        ties = [(rows[name], *tie) for name, tied in self.ties.items() for tie in tied]
        positions = np.array([self.positions.get(name, 0) for name in self.shapes], dtype=np.int64)
        dead = {block: [rows[parameter] for parameter in parameters] for block, parameters in self.blocks.items()}
        return _CostArrays(
            sizes,
            positions,
            np.array([tie[0] for tie in ties], dtype=np.int64),
            np.array([tie[1] for tie in ties], dtype=np.int64),
            [tie[2] for tie in ties],
            np.array([tie[3] for tie in ties], dtype=np.int64),
            np.array([tie[4] for tie in ties], dtype=bool),
            dead,
        )

    def _elements(
        self, removed: Mapping[str, int], removed_heads: Mapping[str, int], removed_blocks: Iterable[str]
    ) -> np.ndarray:
        """Elements of every parameter after a cut: (parameters,)."""
        arrays = self._arrays
        sizes = arrays.sizes.copy()
        channels = np.array([removed.get(group, 0) for group in arrays.groups], dtype=np.int64)
        heads = np.array([removed_heads.get(group, 0) for group in arrays.groups], dtype=np.int64)
        np.subtract.at(
            sizes, (arrays.rows, arrays.dims), arrays.elements * np.where(arrays.whole_heads, heads, channels)
        )
        for block in removed_blocks:
            sizes[arrays.dead[block]] = 0
        return sizes.prod(axis=1)

    def _products(self, removed: Mapping[str, int], removed_blocks: Iterable[str]) -> dict[str, int]:
        """MACs in the two products of every attention after a cut."""
        gone = tuple(f"{block}." for block in removed_blocks)
        return {
            group: 0 if f"{group}.".startswith(gone) else per_channel * (self.channels[group] - removed.get(group, 0))
            for group, per_channel in self.attention.items()
        }


class _CostArrays(NamedTuple):
    """The tables of a cost model as arrays: one row for each parameter, one entry for each tie."""

    sizes: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    dims: np.ndarray
    groups: list[str]
    elements: np.ndarray
    whole_heads: np.ndarray
    dead: dict[str, list[int]]


def cost_model(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup], blocks: Sequence[ResidualBlock] = ()
) -> CostModel:
    """Measure, by one forward pass on the meta device, what every channel and every block costs.

    Raises:
        UnsupportedArchitectureError: MACs of a prunable part cannot be attributed to widths.
    """
    inner = light_copy(model.model)
    counter = _run_counter(inner, model.config.image_size)
    # Keys are paths below the class name of the module that was called.
    flops = {
        path.partition(".")[2]: sum(ops.values()) for path, ops in counter.get_flop_counts().items() if "." in path
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in inner.named_parameters()}
    positions: dict[str, int] = {}
    for name, module in inner.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if flops.get(name) and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            positions[weight] = flops[name] // 2 // module.weight.numel()
    attention = {}
    for group in groups:
        if group.num_heads:
            inside = sum(flops.get(path, 0) for path in _children(inner, group.name))
            attention[group.name] = (flops.get(group.name, 0) - inside) // 2 // group.channels
    base = ModelCost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))
    layers = sum(count * math.prod(shapes[name]) for name, count in positions.items())
    channels = {group.name: group.channels for group in groups if group.num_heads}
    products = sum(attention[name] * count for name, count in channels.items())
    ties: dict[str, list[tuple[int, str, int, bool]]] = {}
    for group in groups:
        for member, whole_heads in [*((m, False) for m in group.members), *((m, True) for m in group.head_members)]:
            if member.parameter in shapes:
                tie = (member.dim, group.name, member.index.shape[1], whole_heads)
                ties.setdefault(member.parameter, []).append(tie)
    return CostModel(
        base,
        base.macs - layers - products,
        positions,
        attention,
        shapes,
        {name: tuple(tied) for name, tied in ties.items()},
        channels,
        {block.name: block.parameters for block in blocks},
    )


def _children(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
