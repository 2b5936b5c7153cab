"""Separate the tensors of a nested value, such as a batch or an output, from its form: `separate`, `tensors_of`.

Private names of torch that are used here and in no other module of `models` (as of 2.14): those of
`torch.utils._pytree`, which also knows the outputs of transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from isoprune_hf.errors import UnsupportedArchitectureError


@dataclass(frozen=True, eq=False)
class Form:
    """A nested value without its tensors.

    Args:
        spec: The containers.
        leaves: The leaves, with None in place of tensors.
        places: Positions of the tensors among the leaves.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    places: tuple[int, ...]

    def fill(self, tensors: Sequence[Tensor | None]) -> Any:
        """Return the nested value with these tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)


def separate(value: Any) -> tuple[tuple[Tensor, ...], Form]:
    """Return the tensors in a nested value, and its form."""
    leaves, spec = tree_flatten(value)
    places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return tuple(leaves[place] for place in places), Form(spec, others, places)


def tensors_of(output: Any, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the tensors with these names in a named output; without names, or of other outputs, all tensors.

    Raises:
        UnsupportedArchitectureError: The output has no tensor of a name.
    """
    if names and isinstance(output, Mapping):
        for name in names:
            if not isinstance(output.get(name), Tensor):
                raise UnsupportedArchitectureError(
                    f"the network returns {', '.join(output)}, and no {name}, as its task needs; it cannot be pruned"
                )
        return tuple(output[name] for name in names)
    return separate(output)[0]
