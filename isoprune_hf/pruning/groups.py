"""The removable units of a network as values: coupled groups of channels, and residual blocks.

They name parameters and indices only, so that their users do not depend on the engine that found them.
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
    """Channels that can only be removed together with the tensor elements that write and read them.

    Args:
        name: Name of the group: the module that creates its channels.
        signature: Structure of the group; groups with equal signatures form an isomorphic class (see `trace_groups`).
        channels: Number of channels.
        members: Elements of each channel.
        num_heads: Heads of an attention, 0 for other groups; channel c is dim c % head_dim of head c // head_dim.
            Query heads that share a key and value head (grouped-query attention) are one head here, since they can
            only be removed together.
        head_members: Elements of each whole head; `index` has the shape (num_heads, k).
        dim_members: Elements of one dim of all heads (norms on queries and keys); `index` has the shape (head_dim, k).
            If there are any, the same dims are removed from every head.
        sliding: Weights of convolutions that run along the channels (ECA). A kernel sees other neighbours after a cut,
            so the cut is not the same as setting the removed channels to zero.
    """

    name: str
    signature: str
    channels: int
    members: tuple[Member, ...]
    num_heads: int = 0
    head_members: tuple[Member, ...] = ()
    dim_members: tuple[Member, ...] = ()
    sliding: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Dims of each head; 0 for groups other than attention."""
        return self.channels // self.num_heads if self.num_heads else 0

    @property
    def is_attention(self) -> bool:
        """True if the channels are the dims of an attention, also of one whose heads were not found."""
        return self.num_heads > 0 or self.signature.startswith("Attention:")


@dataclass(frozen=True)
class ResidualBlock:
    """A block that can be removed as a whole, because its output is its input plus a computed residual.

    Args:
        name: Path of the module.
        signature: Structure of the block; blocks with equal signatures form an isomorphic class.
        parameters: Names of its parameters, relative to the base module.
        is_optional: All such blocks of a stage may be removed, since the stage keeps another block in any case (the
            first one of a ResNet, with a projection); otherwise one block of the stage must be kept.
    """

    name: str
    signature: str
    parameters: tuple[str, ...]
    is_optional: bool = False
