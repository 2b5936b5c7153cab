"""The values of a conversion to a stock model: its sizes, config and tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from isoprune_hf.errors import CheckpointError

State = dict[str, torch.Tensor]


class StockModel(NamedTuple):
    """A config of transformers and the tensors of its model by name."""

    config: PreTrainedConfig
    state: State


class StockSizes(NamedTuple):
    """Sizes of a stock config that describe its blocks."""

    num_hidden_layers: int
    head_dim: int
    num_attention_heads: int
    intermediate_size: int


def read_sizes(query_widths: Sequence[int], head_dims: Sequence[int], mlps: Sequence[nn.Linear]) -> StockSizes:
    """Read the sizes of a stock config from the blocks of a cut model.

    Args:
        query_widths: Width of the queries of each block.
        head_dims: Dims of a head in each block.
        mlps: First layer of the MLP of each block.

    Raises:
        CheckpointError: The blocks have different sizes.
    """
    head_dim = _require_equal("head dims", head_dims)
    return StockSizes(
        num_hidden_layers=len(head_dims),
        head_dim=head_dim,
        num_attention_heads=_require_equal("heads", query_widths) // head_dim,
        intermediate_size=_require_equal("MLP widths", [layer.out_features for layer in mlps]),
    )


def scale_tensor(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Return the tensor times a factor; the tensor itself if the factor is 1."""
    return tensor if abs(factor - 1) < 1e-9 else tensor * factor


def _require_equal(name: str, sizes: Sequence[int]) -> int:
    if len(set(sizes)) != 1:
        raise CheckpointError(f"layout uniform: the blocks have different {name}: {list(sizes)}")
    return sizes[0]
