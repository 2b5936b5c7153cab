"""How big a model is, and how big a plan would make it: exact multiply-accumulates and parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.groups import CoupledGroup, Member


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
    counter = _run_counter(meta_copy(model), image_size)
    return ModelCost(counter.get_total_flops() // 2, sum(parameter.numel() for parameter in model.parameters()))


def _run_counter(model: IsoPruneForImageClassification, image_size: Sequence[int] | None = None) -> FlopCounterMode:
    example = torch.zeros(1, *(image_size or model.config.image_size), device="meta")
    counter = FlopCounterMode(display=False)
    # The math backend spells attention out as two products; the fused kernels have no meta implementation to count.
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model.model(example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedArchitectureError(f"{type(model.model).__name__} does not run: {error}") from error
    return counter


@dataclass(frozen=True)
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
    """

    base: ModelCost
    constant: int
    positions: Mapping[str, int]
    attention: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, tuple[tuple[int, str, int, bool], ...]] = field(default_factory=dict)

    def cost(self, removed: Mapping[str, int], removed_heads: Mapping[str, int]) -> ModelCost:
        """Cost after a cut.

        Args:
            removed: Group -> channels that leave.
            removed_heads: Attention group -> whole heads that leave (their channels are counted in `removed` too).
        """
        params, macs = 0, self.constant
        for name, shape in self.shapes.items():
            sizes = list(shape)
            for dim, group, elements, whole_heads in self.ties.get(name, ()):
                sizes[dim] -= elements * (removed_heads if whole_heads else removed).get(group, 0)
            numel = 1
            for size in sizes:
                numel *= size
            params += numel
            macs += self.positions.get(name, 0) * numel
        macs -= sum(per_channel * removed.get(group, 0) for group, per_channel in self.attention.items())
        return ModelCost(macs, params)


def cost_model(model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]) -> CostModel:
    """Measure, by one forward pass on the meta device, what every channel costs.

    Raises:
        UnsupportedArchitectureError: MACs of a prunable part cannot be attributed to widths.
    """
    architecture = meta_copy(model)
    counter = _run_counter(architecture)
    inner = architecture.model
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
    layers = sum(count * torch.Size(shapes[name]).numel() for name, count in positions.items())
    ties: dict[str, list[tuple[int, str, int, bool]]] = {}
    for group in groups:
        for member, whole_heads in [*((m, False) for m in group.members), *((m, True) for m in group.head_members)]:
            if member.parameter in shapes:
                ties.setdefault(member.parameter, []).append((member.dim, group.name, _elements(member), whole_heads))
    return CostModel(base, base.macs - layers, positions, attention, shapes, {k: tuple(v) for k, v in ties.items()})


def _children(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]


def _elements(member: Member) -> int:
    return member.index.shape[1]
