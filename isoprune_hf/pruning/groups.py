"""What can leave a network, as values: coupled groups of channels, and residual blocks.

They speak of parameters and indices only, so nothing that uses them depends on the engine that found them.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Member:
    """The elements of one tensor that belong to the channels of a group.

    Args:
        parameter: Name of a parameter or buffer, relative to the base module.
        dim: Dim of the tensor that the channels lie on.
        index: Positions on `dim`: row c holds the k positions of channel c; shape (channels, k).
    """

    parameter: str
    dim: int
    index: np.ndarray


@dataclass(frozen=True, eq=False)
class CoupledGroup:
    """Channels that can only leave together with what reads and writes them.

    Args:
        name: Name of the group: the module that creates its channels.
        signature: What the group is built of; equal signatures are one isomorphic class (see `trace_groups`).
        channels: Number of channels.
        members: What belongs to each channel.
        num_heads: For attention: channel c is dim c % head_dim of head c // head_dim. Where several query heads share
            a key and value head (grouped-query attention), they are one head here: they can only leave together.
            Otherwise 0.
        head_members: For attention: what belongs to each whole head; `index` has the shape (num_heads, k).
        dim_members: For attention: what belongs to a dim of all heads (norms on queries and keys); `index` has the
            shape (head_dim, k). Where there are any, the same dims leave every head.
    """

    name: str
    signature: str
    channels: int
    members: tuple[Member, ...]
    num_heads: int = 0
    head_members: tuple[Member, ...] = ()
    dim_members: tuple[Member, ...] = ()

    @property
    def head_dim(self) -> int:
        """Dims of each head; 0 for a group that is no attention."""
        return self.channels // self.num_heads if self.num_heads else 0

    @property
    def is_attention(self) -> bool:
        """True if the channels are the dims of an attention, also of one whose heads were not found."""
        return self.num_heads > 0 or self.signature.startswith("Attention:")


@dataclass(frozen=True)
class ResidualBlock:
    """A block that can leave whole, because its output is its input plus what it computes.

    Args:
        name: The module.
        signature: Its kind; the blocks of one kind are one isomorphic class.
        parameters: Names of its parameters, relative to the base module.
        is_optional: Others of its kind stay in its stage whatever leaves (a ResNet's first block, with a projection);
            otherwise one block of the stage must stay.
    """

    name: str
    signature: str
    parameters: tuple[str, ...]
    is_optional: bool = False
