"""Copies of a module tree: without its weights, or with other tensors in their place.

Like `copy.deepcopy`, which spends most of its time on tables of modules and on tuples of numbers.
"""

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from isoprune_hf.pruning.graph.layers import NORMS

_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "transformers.activations")
_IMMUTABLE = frozenset((int, float, bool, str, type(None), type, torch.device, torch.dtype))
_TABLES = frozenset((dict, OrderedDict))
_CACHED = functools._lru_cache_wrapper


def copy_shapes(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a module tree without its weights: every tensor becomes an empty one on the meta device; hooks stay behind.

    Unlike a fresh build, this needs no config, draws no initial weights and keeps whatever was cut or set since.

    Args:
        module: The tree.
        dtype: What floating tensors become; they keep their own when not given.
    """

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        kind = dtype if tensor.is_floating_point() else None
        blank = torch.empty_like(tensor, device="meta", dtype=kind, requires_grad=False)
        return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank

    return copy_modules(module, empty, with_hooks=False)


def light_copy(base: nn.Module, stand_in: Callable[[torch.Tensor], torch.Tensor] | None = None) -> nn.Module:
    """Copy a base to run on the meta device for its shapes and matrix products alone: float32, in eval mode.

    Norms still check that all their tensors are as wide as what they are given.

    Args:
        base: The network.
        stand_in: What norms and activations do, instead of nothing at all.
    """
    network = copy_shapes(base, dtype=torch.float32).eval()
    stand_in = stand_in or _pass_on
    for module in network.modules():
        if isinstance(module, NORMS):
            module.forward = partial(_check_width, module, stand_in)
        elif type(module).__module__ in _ACTIVATIONS and not isinstance(module, nn.GLU) and not _has_weights(module):
            module.forward = stand_in
    return network


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _pass_on(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _check_width(
    norm: nn.Module, stand_in: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """Stand for a norm: refuse what it would refuse."""
    tensors = [*norm._parameters.values(), *norm._buffers.values()]
    widths = {tensor.numel() for tensor in tensors if tensor is not None and tensor.ndim}
    is_layer_norm = isinstance(norm, nn.LayerNorm)
    last = math.prod(hidden.shape[-len(norm.normalized_shape) :]) if is_layer_norm else hidden.shape[1]
    if widths - {last} and widths - {hidden.shape[1]}:
        raise RuntimeError(f"a {type(norm).__name__} of {sorted(widths)} channels is given {list(hidden.shape)}")
    return stand_in(hidden)


def blank_image(network: nn.Module, image_size: Sequence[int]) -> torch.Tensor:
    """Make an image for a network, on its device and in its dtype: (1, C, H, W)."""
    weight = next(network.parameters())
    return torch.zeros(1, *image_size, device=weight.device, dtype=weight.dtype)


def copy_modules(
    root: nn.Module,
    copy_tensor: Callable[[torch.Tensor], torch.Tensor],
    *,
    replaced: Mapping[nn.Module, nn.Module] | None = None,
    with_hooks: bool = True,
) -> nn.Module:
    """Copy a module tree; what is shared in it is shared in the copy.

    Args:
        root: The tree.
        copy_tensor: Makes the copy of a parameter, buffer or other tensor; called once for each.
        replaced: Modules that are not copied -> what takes their place.
        with_hooks: Hand on the hooks, too.
    """
    memo: dict[int, object] = {id(old): new for old, new in (replaced or {}).items()}
    modules = _walk(root, set(memo))
    for old in modules:
        memo[id(old)] = old.__new__(type(old))
        for tensor in [*vars(old).values(), *old._parameters.values(), *old._buffers.values()]:
            if type(tensor) not in _IMMUTABLE and isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = copy_tensor(tensor)
    for old in modules:
        values = memo[id(old)].__dict__
        for name, value in vars(old).items():
            if type(value) in _IMMUTABLE:
                values[name] = value
            elif type(value) in _TABLES and (not value or (not with_hooks and "_hooks" in name)):
                values[name] = type(value)()
            elif not isinstance(getattr(value, "__func__", None), _CACHED):  # these are full of the old tensors
                values[name] = _copy_value(value, memo)
    return memo[id(root)]


def _walk(module: nn.Module, seen: set[int]) -> list[nn.Module]:
    """Modules in the order of `named_modules`, without those in `seen` and what only they hold."""
    found = [module]
    seen.add(id(module))
    for child in module._modules.values():
        if child is not None and id(child) not in seen:
            found += _walk(child, seen)
    return found


def _copy_value(value: object, memo: dict[int, object]) -> object:
    if type(value) in _IMMUTABLE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in _TABLES:
        memo[id(value)] = copied = type(value)()
        copied.update((name, _copy_value(part, memo)) for name, part in value.items())
        return copied
    if type(value) is set:
        memo[id(value)] = copied = {_copy_value(part, memo) for part in value}
        return copied
    if type(value) is tuple:
        parts = tuple(_copy_value(part, memo) for part in value)
        return value if all(new is old for new, old in zip(parts, value, strict=True)) else parts
    return copy.deepcopy(value, memo)
