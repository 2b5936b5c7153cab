"""Undo the traces that forward passes leave in modules: `undoing_passes`.

Modules keep attention maps, cache tables of the last pass, or write buffers. Such tensors belong to the graph of their
pass, so a second backward pass fails at them, and they must not remain in the model of the caller.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from operator import is_
from typing import Any

import torch
from torch import nn

# Changed on purpose while a model is in use.
_KEPT = frozenset(("training", "forward"))
_CONTAINERS = (dict, list, deque, set)


@contextmanager
def undoing_passes(model: nn.Module) -> Iterator[None]:
    """Undo the changes of each forward pass to attributes and buffers of modules.

    Buffers are undone when a pass ends, attributes when the next one begins and at the end. Parameters and modes, and
    buffers that are written between two passes, are left as they are. Within the context, modules that cache tables
    in eval mode begin with an empty cache, as after `train()`.

    Args:
        model: Its own forward pass marks the beginning of a pass.
    """
    before = _State(model)
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    model.eval()
    for module, mode in modes:
        module.training = mode
    empty, buffers = _State(model), _Buffers(model)

    def begin(*_: Any) -> None:
        empty.restore()
        buffers.note()

    def end(*_: Any) -> None:
        buffers.undo()

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        buffers.reunite()
        before.restore()


class _Slot:
    """A buffer before a pass: its owner's table and name, its number of writes and its values."""

    def __init__(self, table: dict[str, torch.Tensor | None], name: str, first: torch.Tensor):
        self.table, self.name, self.first = table, name, first
        self.hold(first)

    def hold(self, buffer: torch.Tensor) -> None:
        """Note the values of a buffer; tensors of inference mode count no writes and are never written."""
        self.buffer, self.saved = buffer, buffer.detach().clone()
        self._counts = not buffer.is_inference()
        self._writes = buffer._version if self._counts else 0

    def is_written(self) -> bool:
        """Return whether the buffer was written since `hold`."""
        return self._counts and self.buffer._version != self._writes


class _Buffers:
    """The buffers of a model. Those that a pass writes are undone; writes between passes, such as a repair's, stay."""

    def __init__(self, model: nn.Module):
        self._slots = [
            _Slot(module._buffers, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def note(self) -> None:
        """Note the values with which a pass begins."""
        for slot in self._slots:
            now = slot.table.get(slot.name)
            if now is not None and (now is not slot.buffer or slot.is_written()):
                slot.hold(now)

    def undo(self) -> None:
        """Undo the writes of a pass; its graph may refer to a tensor that it wrote, so another takes its place."""
        for slot in self._slots:
            if slot.is_written():
                slot.hold(slot.saved)
            slot.table[slot.name] = slot.buffer

    @torch.no_grad()
    def reunite(self) -> None:
        """Put the first tensor of each buffer back in its place, with the values of now."""
        for slot in self._slots:
            now = slot.table.get(slot.name)
            if now is slot.buffer and now is not slot.first:
                slot.first.copy_(now)
                slot.table[slot.name] = slot.first


class _State:
    """Attributes of all modules of a model and contents of containers, as they are now."""

    def __init__(self, model: nn.Module):
        self._attributes = [_Attributes(module) for module in model.modules()]
        self._contents: dict[int, tuple[Any, Any]] = {}
        for attributes in self._attributes:
            for value in attributes.values.values():
                self._note(value)

    def _note(self, value: Any) -> None:
        if isinstance(value, _CONTAINERS) and id(value) not in self._contents:
            self._contents[id(value)] = (value, value.copy())
            for part in value.values() if isinstance(value, dict) else value:
                self._note(part)

    def restore(self) -> None:
        """Restore the state, in place."""
        for attributes in self._attributes:
            if not attributes.are_restored():
                attributes.restore()
        for value, content in self._contents.values():
            if _has_same(value, content):
                continue
            value.clear()
            value.extend(content) if isinstance(value, list | deque) else value.update(content)


class _Attributes:
    """The attributes of a module: those of now, and those to restore."""

    def __init__(self, module: nn.Module):
        self.now = vars(module)
        self.values = {name: value for name, value in self.now.items() if _is_plain(name)}
        self._names = tuple(self.now)

    def are_restored(self) -> bool:
        """Return whether no attribute to restore has changed, and there are no others than after `restore`.

        It is called for every module in each pass, and a pass changes hardly any: the loops over names run in C.
        """
        return tuple(self.now) == self._names and all(map(is_, map(self.now.get, self.values), self.values.values()))

    def restore(self) -> None:
        """Restore the values, in place."""
        for name in [name for name in self.now if name not in self.values and _is_plain(name)]:
            del self.now[name]
        for name, value in self.values.items():
            if self.now.get(name) is not value:
                self.now[name] = value
        self._names = tuple(self.now)


@cache
def _is_plain(name: str) -> bool:
    """Return whether an attribute is not one in which `nn.Module` itself keeps its parts."""
    registry = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return name not in registry and name not in _KEPT and "_hooks" not in name


def _has_same(one: Any, other: Any) -> bool:
    """Return whether two containers have the same objects in the same order, and names if they are dicts."""
    if len(one) != len(other) or not all(map(is_, one, other)):
        return False
    return not isinstance(one, dict) or all(map(is_, one.values(), other.values()))
