"""Convert cut ViT and DeiT of transformers to stock ones: call `convert_transformers`."""

import copy
from typing import Protocol, TypeGuard

from torch import nn
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    ViTForImageClassification,
)

from isoprune_hf.checkpoint.modeling_isoprune import SkippedBlock
from isoprune_hf.pruning.cutting.stock_sizes import State, StockModel, read_sizes, scale_tensor


class _Attention(Protocol):
    q_proj: nn.Linear
    head_dim: int
    scaling: float


class _Mlp(Protocol):
    fc1: nn.Linear


class _Layer(Protocol):
    attention: _Attention
    mlp: _Mlp

    def state_dict(self) -> State: ...


class StockViT(Protocol):
    """The parts of a ViT or DeiT of transformers that a conversion reads."""

    config: PreTrainedConfig
    base_model_prefix: str

    def state_dict(self) -> State:
        """Return the tensors by name."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its path."""
        ...


def is_stock_vit(network: nn.Module) -> TypeGuard[StockViT]:
    """Check whether a network is a ViT or DeiT of transformers, and not a subclass of one."""
    return type(network) in (
        ViTForImageClassification,
        DeiTForImageClassification,
        DeiTForImageClassificationWithTeacher,
    )


def convert_transformers(network: StockViT) -> StockModel:
    """Convert a cut ViT or DeiT of transformers to a config that names its sizes, and the tensors of its model.

    Raises:
        CheckpointError: The blocks have different sizes.
    """
    body = network.base_model_prefix
    layers = [layer for layer in network.get_submodule(f"{body}.layers").children() if _is_layer(layer)]
    sizes = read_sizes(
        [layer.attention.q_proj.out_features for layer in layers],
        [layer.attention.head_dim for layer in layers],
        [layer.mlp.fc1 for layer in layers],
    )
    tensors = network.state_dict()
    hidden_size = tensors[f"{body}.embeddings.patch_embeddings.projection.weight"].shape[0]
    config = copy.deepcopy(network.config)
    # The pooler serves other tasks: a classifier has none.
    for name, value in {**sizes._asdict(), "hidden_size": hidden_size, "pooler_output_size": hidden_size}.items():
        setattr(config, name, value)
    config.architectures = [type(network).__name__]
    prefix = f"{body}.layers."
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    for number, layer in enumerate(layers):
        factor = layer.attention.scaling * layer.attention.head_dim**0.5
        for name, tensor in layer.state_dict().items():
            is_query = name.startswith("attention.q_proj.")
            state[f"{prefix}{number}.{name}"] = scale_tensor(tensor, factor) if is_query else tensor
    return StockModel(config, state)


def _is_layer(module: nn.Module) -> TypeGuard[_Layer]:
    """Check whether a module of the list of layers was not removed."""
    return not isinstance(module, SkippedBlock)
