"""The copy of a network that torch-pruning traces: `traced_copy`, with stand-ins for attention and patch merging."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isoprune_hf.pruning.graph.copying import copy_simplified
from isoprune_hf.pruning.graph.layers import NORMS, ConvNd
from isoprune_hf.pruning.graph.torch_pruning.architectures import (
    Attention,
    PatchMerging,
    find_attention,
    find_patch_merging,
)

# Layers that torch-pruning finds by itself; any other parameter is passed to it with the dim of its channels.
_LAYERS = (nn.Linear, ConvNd, *NORMS, nn.PReLU, nn.Embedding)


@dataclass(frozen=True, eq=False)
class TracedNetwork:
    """A copy of a base on the meta device, to be run once.

    Args:
        network: The copy; all its parameters require gradients, so that a forward pass builds the autograd graph.
        stubs: Linear layer in the copy -> the part of the base that it replaces.
    """

    network: nn.Module
    stubs: dict[str, Attention | PatchMerging]


def traced_copy(base: nn.Module) -> TracedNetwork:
    """Copy a base for tracing, with a linear layer for each attention and patch merging.

    Each norm and activation becomes a single operation.

    Raises:
        UnsupportedArchitectureError: An attention or a patch merging has an unknown build.
    """
    attentions, mergings = list(find_attention(base)), list(find_patch_merging(base))
    # A clone is the cheapest operation that adds a node to the autograd graph.
    network = copy_simplified(base, stand_in=torch.clone).requires_grad_(True)
    stubs: dict[str, Attention | PatchMerging] = {}
    for attention in attentions:
        inputs = _linear(base, attention.projections[0]).in_features
        outputs = _linear(base, attention.output).out_features
        stub = _AttentionStub(inputs, outputs, returns_tuple=attention.returns_tuple)
        network.set_submodule(attention.path, stub)
        stubs[f"{attention.path}.linear"] = attention
    for merging in mergings:
        reduction = _linear(base, merging.reduction)
        network.set_submodule(merging.path, _PatchMergingStub(reduction.in_features // 4, reduction.out_features))
        stubs[f"{merging.path}.linear"] = merging
    return TracedNetwork(network.eval(), stubs)


def _linear(base: nn.Module, path: str) -> nn.Linear:
    layer = base.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{path} is a {type(layer).__name__}, not a linear layer")
    return layer


def loose_parameters(network: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Find the parameters that belong to no layer (tokens, positions, LayerScale), and the dim of their channels.

    Returns:
        (parameter, its last dim that is not 1).
    """
    owned = {
        id(p) for module in network.modules() if isinstance(module, _LAYERS) for p in module.parameters(recurse=False)
    }
    loose = [p for p in network.parameters() if id(p) not in owned]
    return [(p, max(d for d, size in enumerate(p.shape) if size > 1)) for p in loose if p.numel() > 1]


class _AttentionStub(nn.Module):
    """An attention as a single linear layer; `coupling.couple_attention` finds its groups without a trace."""

    def __init__(self, inputs: int, outputs: int, *, returns_tuple: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, device="meta")
        self.returns_tuple = returns_tuple

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        output: Tensor = self.linear(hidden)
        return (output, None) if self.returns_tuple else output


class _PatchMergingStub(nn.Module):
    """A patch merging as a linear layer on one of its four patches, with the same output shape."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, device="meta")

    def forward(self, hidden: Tensor, dimensions: tuple[int, int] | None = None) -> Tensor:
        if dimensions is None:  # timm: (B, H, W, C)
            batch, height, width, channels = hidden.shape
            like = hidden.new_zeros((batch, (height + 1) // 2, (width + 1) // 2, channels))
            output: Tensor = self.linear(hidden.mean((1, 2), keepdim=True) + like)
            return output
        height, width = dimensions  # transformers: (B, H * W, C)
        like = hidden.new_zeros((hidden.shape[0], ((height + 1) // 2) * ((width + 1) // 2), hidden.shape[2]))
        output = self.linear(hidden.mean(1, keepdim=True) + like)
        return output
