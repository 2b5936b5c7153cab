"""The network as it is traced: without its weights, and with stand-ins for what is too slow or intricate to trace."""

from dataclasses import dataclass

import torch
from torch import nn

from isoprune_hf.pruning.graph.copying import light_copy
from isoprune_hf.pruning.graph.layers import NORMS, ConvNd
from isoprune_hf.pruning.graph.torch_pruning.architectures import (
    Attention,
    PatchMerging,
    find_attention,
    find_patch_merging,
)

_LAYERS = (
    nn.Linear,
    ConvNd,
    *NORMS,
    nn.PReLU,
    nn.Embedding,
)


@dataclass(frozen=True, eq=False)
class TracedNetwork:
    """A copy of a base on the meta device, made to be run once.

    Args:
        network: The copy; all its parameters ask for gradients, so that a forward pass leaves its graph.
        stubs: Linear in the copy -> the part of the base that it stands for.
    """

    network: nn.Module
    stubs: dict[str, Attention | PatchMerging]


def traced_copy(base: nn.Module) -> TracedNetwork:
    """Copy a base for tracing: attention and patch merging become one linear each, a norm or activation one operation.

    Raises:
        UnsupportedArchitectureError: An attention or a patch merging of an unknown build.
    """
    attentions, mergings = list(find_attention(base)), list(find_patch_merging(base))
    # A clone is the cheapest operation that leaves a node of its own in the graph.
    network = light_copy(base, stand_in=torch.clone).requires_grad_(True)
    stubs: dict[str, Attention | PatchMerging] = {}
    for part in attentions:
        inputs = base.get_submodule(part.projections[0]).in_features
        outputs = base.get_submodule(part.output).out_features
        network.set_submodule(part.path, _AttentionStub(inputs, outputs, part.returns_tuple))
        stubs[f"{part.path}.linear"] = part
    for part in mergings:
        reduction = base.get_submodule(part.reduction)
        network.set_submodule(part.path, _PatchMergingStub(reduction.in_features // 4, reduction.out_features))
        stubs[f"{part.path}.linear"] = part
    return TracedNetwork(network.eval(), stubs)


def loose_parameters(network: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Find the parameters that no layer owns (tokens, positions, LayerScale), and the dim that their channels lie on.

    Returns:
        (parameter, its last dim that is not 1).
    """
    owned = {
        id(p) for module in network.modules() if isinstance(module, _LAYERS) for p in module.parameters(recurse=False)
    }
    loose = [p for p in network.parameters() if id(p) not in owned]
    return [(p, max(d for d, size in enumerate(p.shape) if size > 1)) for p in loose if p.numel() > 1]


class _AttentionStub(nn.Module):
    """Traces as one linear: the channels of attention are known without the engine (see `coupling`)."""

    def __init__(self, inputs: int, outputs: int, returns_tuple: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, device="meta")
        self.returns_tuple = returns_tuple

    def forward(
        self, hidden: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        output = self.linear(hidden)
        return (output, None) if self.returns_tuple else output


class _PatchMergingStub(nn.Module):
    """Traces as one linear over one copy of the channels; keeps the output's shape."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, device="meta")

    def forward(self, hidden: torch.Tensor, dimensions: tuple[int, int] | None = None) -> torch.Tensor:
        if dimensions is None:  # timm: (B, H, W, C)
            batch, height, width, channels = hidden.shape
            shape = (batch, (height + 1) // 2, (width + 1) // 2, channels)
            return self.linear(hidden.mean((1, 2), keepdim=True) + hidden.new_zeros(shape))
        height, width = dimensions  # transformers: (B, H * W, C)
        shape = (hidden.shape[0], ((height + 1) // 2) * ((width + 1) // 2), hidden.shape[2])
        return self.linear(hidden.mean(1, keepdim=True) + hidden.new_zeros(shape))
