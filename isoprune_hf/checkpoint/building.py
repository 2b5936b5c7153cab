# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Budget of a constructor: `Building` is active while it runs (part of the shipped file).

A config of a few bytes can describe a table of any size: that of the relative positions in an attention window grows
with the fourth power of its side. Constructors compute such tables with torch, with numpy, and in loops over lists.
"""

import math
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.overrides import TorchFunctionMode

from isoprune_hf.limits import MAX_BUILD_BYTES, MAX_BUILD_CALLS, MAX_BUILD_STEPS, MAX_TABLE_BYTES, MAX_UNSAVED_BYTES

# Names of the functions and methods by which constructors draw weights.
_DRAWING = ("add_", "clamp_", "constant_", "erfinv_", "kaiming_uniform_", "mul_", "normal_", "uniform_")
_NUMBER_BYTES = 8  # of the largest type
_MOST = math.isqrt(MAX_TABLE_BYTES // _NUMBER_BYTES)  # the square of more numbers is a table that may be too large
_NUMBERS = frozenset((bool, float, int))


class Building(TorchFunctionMode):
    """Bounds the work and the memory of a constructor, and the tensors that it computes before they are allocated.

    Weights on the meta device are not drawn there, which would take five times as long and change nothing.

    Args:
        has_weights: The parameters are on the CPU, so that the memory is not bounded.

    Raises:
        ValueError: The budget is exceeded.
    """

    def __init__(self, *, has_weights: bool = False) -> None:
        super().__init__()
        self._calls = self._bytes = 0
        self._limits = ExitStack()
        self._has_weights = has_weights

    def __enter__(self) -> Any:
        self._limits.enter_context(_limited_steps())
        if not self._has_weights:
            self._limits.enter_context(_limited_memory())
        self._hook = register_module_buffer_registration_hook(self._count)
        return super().__enter__()  # type: ignore[no-untyped-call]  # untyped in torch

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # nor here
        self._limits.__exit__(*error)

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, unless it draws weights that have no values."""
        options = options or {}
        self._calls += 1
        if self._calls > MAX_BUILD_CALLS:
            raise ValueError(f"more than {MAX_BUILD_CALLS:,} operations")
        name = function.__name__
        if name in _DRAWING:
            tensor = arguments[0] if arguments else options["tensor"]
            if tensor.is_meta:
                return tensor
        if name == "__deepcopy__":  # its second argument holds all tensors that were copied before
            _check_copied(arguments[0])
        # Others than these allocate memory and fill it.
        elif not name.startswith("empty") and not (name.endswith("_") and not name.endswith("__")):
            _check_result(function, arguments, options)
        return function(*arguments, **options)

    def _count(self, module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
        if buffer is not None and not buffer.is_meta:
            self._bytes += buffer.untyped_storage().nbytes()
            _require(self._bytes, MAX_UNSAVED_BYTES)


@contextmanager
def _limited_steps() -> Iterator[None]:
    """Count the calls and returns of all functions in this thread; nothing under a profiler.

    Raises:
        ValueError: The bound is exceeded.
    """
    left = MAX_BUILD_STEPS

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {MAX_BUILD_STEPS:,} calls and returns of functions")

    is_free = sys.getprofile() is None
    if is_free:
        sys.setprofile(count)
    try:
        yield
    finally:
        if is_free:
            sys.setprofile(None)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Bound the new memory of this process on Linux, unless other threads may need memory meanwhile.

    Raises:
        ValueError: The bound is exceeded by a list or an array.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        yield
        return
    resource = import_module("resource")  # only Unix has it
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = re.search(r"^VmData:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    wanted = (0 if used is None else 1024 * int(used[1])) + MAX_BUILD_BYTES
    allowed = [limit for limit in (wanted, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(allowed), before[1]))
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"more than {MAX_BUILD_BYTES:,} bytes of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def check_tables(tables: Iterable[torch.Tensor]) -> None:
    """Check the sizes of tensors that no file contains.

    Raises:
        ValueError: One or all of them are too large.
    """
    sizes = {id(table): table.numel() * table.element_size() for table in tables}
    _require(max(sizes.values(), default=0), MAX_TABLE_BYTES)
    _require(sum(sizes.values()), MAX_UNSAVED_BYTES)


def nested_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict) and not _has_only_numbers(value):
        for part in value.values() if isinstance(value, dict) else value:
            yield from nested_tensors(part)


def on_meta(value: Any) -> Any:
    """Return the value with its tensors on the meta device, in containers of the same kind."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if _has_only_numbers(value):
        return value
    if type(value) in (list, tuple):
        return type(value)(on_meta(part) for part in value)
    if type(value) is dict:
        return {name: on_meta(part) for name, part in value.items()}
    return value


def _has_only_numbers(value: Any) -> bool:
    """Return whether a value is a list or tuple of numbers; a table of a million is not looked at one by one."""
    return type(value) in (list, tuple) and _NUMBERS.issuperset(map(type, value))


def _require(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"buffers of {size:,} bytes that are not saved; the limit is {limit:,}")


def _check_copied(tensor: torch.Tensor) -> None:
    """Check the size of a tensor on the CPU before it is copied: an empty one has not been filled."""
    if not tensor.is_meta:
        _require(tensor.untyped_storage().nbytes(), MAX_TABLE_BYTES)


def _check_result(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Check the size of a result on the CPU, by a call on the meta device if it can be large."""
    inputs = (arguments, options)
    # No function makes more numbers than the square: broadcasting, products and repetitions make the product of all
    # sizes, the identity and diagonals that of one size with itself.
    is_small = _NUMBER_BYTES * _bound(inputs) ** 2 <= MAX_TABLE_BYTES
    if is_small or any(tensor.is_meta for tensor in nested_tensors(inputs)):
        return
    creates = next(nested_tensors(inputs), None) is None
    if creates and (options.get("device") or torch.get_default_device()) in ("meta", torch.device("meta")):
        return
    options = on_meta(options)
    if creates or "device" in options:
        options["device"] = "meta"
    try:
        result = function(*on_meta(arguments), **options)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # it reads values, or fails on the CPU as well
        return
    # Not the sum: parts of a tensor share its memory.
    _require(max((part.untyped_storage().nbytes() for part in nested_tensors(result)), default=0), MAX_TABLE_BYTES)


def _bound(value: Any) -> int:
    """Return a bound of the numbers that a function makes of nested values: the product of all whole numbers.

    A list can also be the values of a table. A product above `_MOST` is not continued: that of the million indices of
    an attention window has as many digits.
    """
    if isinstance(value, torch.Tensor):
        return max(value.numel(), 1)
    if not isinstance(value, list | tuple | dict):
        return max(value, 1) if isinstance(value, int) else 1
    product, count = 1, len(value)
    if count <= _MOST:
        for part in value.values() if isinstance(value, dict) else value:
            product *= _bound(part)
            if product > _MOST:
                break
    return max(product, count)
