"""Copies of a module tree: `copy_modules`, `copy_shapes` and `copy_zeros` without weights, `copy_simplified` to count.

`copy.deepcopy` would do the same as `copy_modules`, but spends most of its time on empty hook tables and on tuples of
numbers.
"""

import copy
import functools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from isoprune_hf.models.calling import input_dtype
from isoprune_hf.pruning.graph.layers import NORMS
from isoprune_hf.pruning.graph.torch_private import own_buffers, own_modules, own_parameters

# Modules that define the activations of each library.
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "transformers.activations")
_IMMUTABLE = frozenset((int, float, bool, str, type(None), type, torch.device, torch.dtype))
_TABLES = frozenset((dict, OrderedDict))
# Private attribute of transformers (as of 5.24): hooks that collect hidden states are set, and not set once more.
_HOOKS_SET = "_output_capturing_hooks_installed"
_CACHED = functools._lru_cache_wrapper  # the type of a function with functools.lru_cache, as read in Python 3.11
_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


def copy_shapes(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a module tree without its weights and hooks: every tensor becomes an empty tensor on the meta device.

    Unlike a fresh build, this needs no config, draws no initial weights, and keeps all changes made to the modules.

    Args:
        module: The root of the tree.
        dtype: Dtype of the copies of floating-point tensors; by default each keeps its own.
    """

    def empty(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else None
        blank = torch.empty_like(tensor, device="meta", dtype=kind, requires_grad=False)
        return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank

    return copy_modules(module, empty, with_hooks=False)


def copy_zeros(module: nn.Module) -> nn.Module:
    """Copy a module tree to the CPU with zeros as its weights, for networks that read values as they run (DETR)."""

    def zeros(tensor: Tensor) -> Tensor:
        blank = torch.zeros_like(tensor, device="cpu", requires_grad=False)
        return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank

    return copy_modules(module, zeros, with_hooks=False)


def copy_simplified(base: nn.Module, stand_in: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Copy a network to the meta device, in float32 and eval mode, with stand-ins for its norms and activations.

    These keep shapes and make no matrix products, and the meta device runs them slowly. The stand-in of a norm still
    checks that the norm has as many channels as its input. Activations with parameters and `nn.GLU` are kept.

    Args:
        base: The network.
        stand_in: Function that replaces norms and activations; by default the identity.
    """
    network = copy_shapes(base, dtype=torch.float32).eval()
    function = stand_in or _identity
    for module in network.modules():
        if isinstance(module, NORMS):
            _replace_forward(module, partial(_check_width, module, function))
        elif _is_activation(module) and next(module.parameters(), None) is None:
            _replace_forward(module, function)
    return network


def _is_activation(module: nn.Module) -> bool:
    """Check whether a module keeps the shape of its input, which `nn.GLU` does not."""
    return type(module).__module__ in _ACTIVATIONS and not isinstance(module, nn.GLU)


def _replace_forward(module: nn.Module, function: Callable[..., Tensor]) -> None:
    """Replace the forward method of one module in place."""
    vars(module)["forward"] = function


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def _check_width(norm: nn.Module, stand_in: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Apply `stand_in` in place of a norm; raises a RuntimeError for an input that the norm would reject."""
    tensors = [*own_parameters(norm).values(), *own_buffers(norm).values()]
    widths = {tensor.numel() for tensor in tensors if tensor is not None and tensor.ndim}
    last = hidden.shape[1]
    if isinstance(norm, nn.LayerNorm):
        last = math.prod(tuple(hidden.shape[-len(norm.normalized_shape) :]))
    if widths - {last} and widths - {hidden.shape[1]}:
        raise RuntimeError(f"a {type(norm).__name__} of {sorted(widths)} channels is given {list(hidden.shape)}")
    return stand_in(hidden)


def blank_image(network: nn.Module, image_size: Sequence[int]) -> Tensor:
    """Create an image of zeros on the device and in the dtype of a network: (1, C, H, W)."""
    return torch.zeros(1, *image_size, device=next(network.parameters()).device, dtype=input_dtype(network))


def copy_modules(
    root: _ModuleT,
    copy_tensor: Callable[[Tensor], Tensor],
    *,
    replaced: Mapping[nn.Module, nn.Module] | None = None,
    with_hooks: bool = True,
) -> _ModuleT:
    """Copy a module tree; objects that are shared in the tree are shared in the copy.

    Args:
        root: The root of the tree.
        copy_tensor: Function that copies a parameter, buffer or other tensor; called once for each.
        replaced: Modules that are not copied -> the modules that take their places.
        with_hooks: Copy the hooks, too.
    """
    memo: dict[int, Any] = {id(old): new for old, new in (replaced or {}).items()}
    modules = _walk(root, set(memo))
    for old in modules:
        memo[id(old)] = old.__new__(type(old))
        for tensor in _held_tensors(old):
            if id(tensor) not in memo:
                memo[id(tensor)] = _copy_tensor(tensor, copy_tensor)
    memo[id(None)] = None
    for old in modules:
        values = vars(memo[id(old)])
        tables = _registered(old)
        for name, value in vars(old).items():
            kind = type(value)
            if kind in _IMMUTABLE:
                if name != _HOOKS_SET or with_hooks:
                    values[name] = value
            elif kind in _TABLES and (not value or (not with_hooks and "_hooks" in name)):
                values[name] = kind()
            elif kind in _TABLES and any(value is table for table in tables):
                values[name] = kind((key, memo[id(part)]) for key, part in value.items())
            elif not isinstance(getattr(value, "__func__", None), _CACHED):  # a cache refers to the old tensors
                values[name] = _copy_value(value, memo)
    copied: _ModuleT = memo[id(root)]
    return copied


def _registered(module: nn.Module) -> tuple[Mapping[str, Any], ...]:
    """Return the tables of the parameters, buffers and children of a module itself."""
    return own_parameters(module), own_buffers(module), own_modules(module)


def _held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a module itself holds: parameters, buffers, attributes, and those in containers."""
    children = own_modules(module)
    for value in vars(module).values():
        if type(value) in _IMMUTABLE or value is children:
            continue
        if isinstance(value, Tensor):
            yield value
        elif value and isinstance(value, dict | list | tuple | deque):
            yield from _nested_tensors(value)


def replace_tensor(tensor: Tensor, value: Tensor) -> Tensor:
    """Return a value as a parameter if the tensor that it replaces is one, else unchanged."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _copy_tensor(tensor: Tensor, copy_tensor: Callable[[Tensor], Tensor]) -> Tensor:
    """Copy a tensor; one that a module keeps of an earlier pass leaves the graph of this pass."""
    return copy_tensor(tensor if tensor.is_leaf else tensor.detach())


def _nested_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers of containers."""
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, dict | list | tuple | deque):
            yield from _nested_tensors(part)


def _walk(module: nn.Module, seen: set[int]) -> list[nn.Module]:
    """Return the modules in the order of `named_modules`, without those in `seen` and their children."""
    found = [module]
    seen.add(id(module))
    for child in own_modules(module).values():
        if child is not None and id(child) not in seen:
            found += _walk(child, seen)
    return found


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _IMMUTABLE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in _TABLES:
        table = memo[id(value)] = type(value)()
        table.update((name, _copy_value(part, memo)) for name, part in value.items())
        return table
    if type(value) is set:
        memo[id(value)] = copied = {_copy_value(part, memo) for part in value}
        return copied
    if type(value) is tuple:
        parts = tuple(_copy_value(part, memo) for part in value)
        return value if all(new is old for new, old in zip(parts, value, strict=True)) else parts
    return copy.deepcopy(value, memo)
