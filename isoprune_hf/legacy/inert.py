"""Read a pickle as data: what it speaks of is written down, and nothing of it is imported, called or executed.

The house rule is: no pickle loading, ever. This module keeps it. It does not use Python's unpickler, restricted or
not, but goes through the opcodes that `pickletools` lists and notes what they build: plain values stay plain, an
object becomes an `Inert` record of its class's name and state, and a tensor becomes a `StoredTensor`, its place in
the file. A class is a string here: none is looked up, so there is no `__reduce__`, `__setstate__` or
`__init__` that could run. Opcodes that torch.save does not emit, and names that a checkpoint of a vision model has no
need of, are refused all the same, so that a hostile file ends with a clear line and not with a converted model.
"""

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from isoprune_hf.errors import CheckpointError

# What a checkpoint may speak of. A name is a module of this list plus one identifier: no way leads through a dot.
_CLASSES = re.compile(r"(torch\.nn|timm|torchvision)(\.[A-Za-z_]\w*)+", re.ASCII)
_OTHERS = {
    "__builtin__.set",
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.frozenset",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "functools.partial",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "pathlib.PosixPath",
    "torch.Size",
    "torch._C.Generator",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.device",
    "torch.optim.swa_utils.AveragedModel",
    "utils.ExponentialMovingAverage",
}
_STORAGES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
}
_DTYPES = re.compile(r"torch\.(bfloat16|bool|float(16|32|64)|u?int(8|16|32|64))")
_MOST_STEPS = 2_000_000  # a ResNet-152 with its average and AdamW takes 234,368
_MOST_DIMS = 8


@dataclass(frozen=True)
class Name:
    """The name of a class or function; it is never looked up."""

    text: str


@dataclass(eq=False)
class Inert:
    """An object that the file describes.

    Args:
        kind: Name of its class, or of the function that would have made it.
        args: What that would have been given.
        state: Its attributes.
    """

    kind: str
    args: tuple = ()
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """Where the numbers of tensors lie in the file."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that has not been read yet; it lies within its storage and is not larger."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def refuse(what: str) -> CheckpointError:
    """Give the error for something that a converted file must not hold."""
    return CheckpointError(
        f"holds {what}, which is not allowed; only tensors and modules of torch, timm and torchvision are read, and "
        "nothing of a file is ever executed"
    )


def read_inert(data: bytes) -> Any:
    """Give what a pickle describes, as plain values and records.

    Args:
        data: The pickle.

    Raises:
        CheckpointError: It is damaged, or holds an opcode or a name that is not allowed; the message names it.
    """
    machine = _Machine()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step > _MOST_STEPS:
                raise CheckpointError(f"takes more than {_MOST_STEPS} steps to read")
            if opcode.name == "STOP":
                (result,) = machine.stack
                return result
            machine.step(opcode.name, argument)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"is damaged: its data.pkl cannot be read ({type(error).__name__})") from error
    raise CheckpointError("is damaged: its data.pkl has no end")


class _Machine:
    """The stack and the memo of a pickle; knows the opcodes that torch.save emits, and no others."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self.stack.append(_VALUES[opcode](argument))
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise refuse(f"the pickle opcode {opcode}")

    def memoize(self, argument: int | None) -> None:
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    def mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        items = self.stack[len(self.stack) - count :]
        if len(items) != count:
            raise LookupError
        del self.stack[-count:]
        return items

    def tuple_of(self, items: list[Any]) -> None:
        self.stack.append(tuple(items))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target += items

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # To hash a tuple of tuples of tuples could take for ever.
            if not isinstance(key, str | int | float | None | Inert):
                raise refuse(f"a mapping with a {type(key).__name__} for a key")
            target[key] = value

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        text = f"{module}.{name}"
        known = text in _OTHERS or text in _STORAGES or _DTYPES.fullmatch(text) or _CLASSES.fullmatch(text)
        if not known or not name.isidentifier():
            raise refuse(text if text.isprintable() and len(text) < 100 else repr(text[:99]))
        self.stack.append(Name(text))

    def reduce(self, _: None) -> None:
        function, args = self.pop(2)
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise refuse("a call of what is no name")
        self.stack.append(_CALLS.get(function.text, lambda *args: Inert(function.text, args))(*args))

    def build(self, _: None) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        states = state if isinstance(state, tuple) else (state,)  # with __slots__: two mappings
        if isinstance(target, Inert):
            for part in states:
                if isinstance(part, dict):
                    target.state.update(part)
        elif not isinstance(target, dict):  # of a state_dict: its _metadata
            raise refuse(f"a state for a {type(target).__name__}")


def _storage(identifier: Any) -> Storage:
    kind, name, key, _, count = identifier
    dtype = _STORAGES.get(name.text)
    if kind != "storage" or dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
        raise refuse("a reference to something other than a storage of numbers")
    return Storage(key, dtype, count)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    numbers = (offset, *shape, *stride)
    holds = isinstance(storage, Storage) and len(shape) == len(stride) <= _MOST_DIMS
    holds = holds and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
    if not holds:
        raise refuse("a tensor without a storage, a shape and strides")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if prod(shape) > storage.count or (prod(shape) and last >= storage.count):
        raise CheckpointError(f"is damaged: a tensor of shape {list(shape)} does not fit {storage.count} numbers")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise refuse("a parameter that is no tensor")
    return data


def _ordered(*args: Any) -> dict:
    if any(args):
        raise refuse("an OrderedDict that is made from a call")
    return {}


_CALLS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered,
}
_VALUES: dict[str, Callable] = {
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"), lambda value: value
    ),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), lambda value: value),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_SET": lambda _: [],
    "EMPTY_DICT": lambda _: {},
}
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.reduce),
    "MARK": _Machine.mark,
    "POP": lambda machine, _: machine.pop(1),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "TUPLE": lambda machine, _: machine.tuple_of(machine.since_mark()),
    "TUPLE1": lambda machine, _: machine.tuple_of(machine.pop(1)),
    "TUPLE2": lambda machine, _: machine.tuple_of(machine.pop(2)),
    "TUPLE3": lambda machine, _: machine.tuple_of(machine.pop(3)),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop(2)),
    "BINPERSID": lambda machine, _: machine.stack.append(_storage(*machine.pop(1))),
    "BUILD": _Machine.build,
}
