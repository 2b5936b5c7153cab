"""Parse a pickle as data: `read_pickle` imports, calls and executes nothing.

Python's unpickler is not used, not even a restricted one. The opcodes that `pickletools` lists are interpreted here:
plain values stay plain, an object becomes an `ObjectRecord` with the name of its class and its state, and a tensor
becomes a `StoredTensor`, its position in the file. A class is a string and is never looked up, so no `__reduce__`,
`__setstate__` or `__init__` can run. Opcodes that torch.save does not write, and names that a checkpoint of a vision
model does not need, are refused all the same: a hostile file ends in a clear message and not in a converted model.
"""

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from isoprune_hf.errors import CheckpointError
from isoprune_hf.legacy.work import Work

# Names that a checkpoint may contain: a module of these packages plus one identifier, never an attribute of a class.
_CLASS_NAMES = re.compile(r"(torch\.nn|timm|torchvision)(\.[A-Za-z_]\w*)+", re.ASCII)
_OTHER_NAMES = {
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
_STORAGE_DTYPES = {
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
_DTYPE_NAMES = re.compile(r"torch\.(bfloat16|bool|float(16|32|64)|u?int(8|16|32|64))")
_MAX_NAME = 200  # characters of the name of a class
_MAX_KEY = 2**60  # of whole numbers; larger ones can be chosen so that all have the same hash
_MAX_DIMENSIONS = 8
_MAX_TENSOR_NUMBER = 2**48  # of offsets, sizes and strides


@dataclass(frozen=True)
class Name:
    """The name of a class or function; it is never looked up."""

    text: str


@dataclass(eq=False)
class ObjectRecord:
    """The description of an object.

    Args:
        kind: Name of its class, or of the function that would have created it.
        args: Arguments of that call.
        state: Attributes of the object.
    """

    kind: str
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors: key, type and count of an entry of the file."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that has not been read yet; all of its numbers are within its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def not_allowed(what: str) -> CheckpointError:
    """Return the error for content that a checkpoint must not have."""
    return CheckpointError(
        f"contains {what}, which is not allowed; only tensors and modules of torch, timm and torchvision are read, "
        "and nothing in a file is executed"
    )


def read_pickle(data: bytes) -> Any:
    """Return the content of a pickle as plain values and records.

    Args:
        data: The pickle.

    Raises:
        CheckpointError: The pickle is damaged, or contains an opcode or a name that is not allowed.
    """
    machine = _StackMachine()
    try:
        operations = pickletools.genops(data)
        for opcode, argument, _ in operations:
            machine.work.spend(1)
            if opcode.name == "STOP":
                (result,) = machine.stack
                return result
            machine.step(opcode.name, argument)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"is damaged: its data.pkl cannot be read ({type(error).__name__})") from error
    raise CheckpointError("is damaged: its data.pkl has no end")


class _StackMachine:
    """Interpreter of the opcodes that torch.save writes, with the stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks that were interrupted by marks
        self.memo: dict[int, Any] = {}
        self.work = Work()

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self.stack.append(_VALUES[opcode](argument))
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise not_allowed(f"the pickle opcode {opcode}")

    def memoize(self, argument: int | None) -> None:
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    def mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        items = self.stack[len(self.stack) - count :]
        if len(items) != count:
            raise LookupError
        del self.stack[-count:]
        return items

    def push_tuple(self, items: list[Any]) -> None:
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
            # Hashing deeply nested tuples could take forever.
            if not isinstance(key, str | int | float | None | ObjectRecord):
                raise not_allowed(f"a mapping with a {type(key).__name__} for a key")
            if isinstance(key, int) and abs(key) >= _MAX_KEY:
                raise not_allowed("a number of more than 60 bits for a key")
            target[key] = value

    def push_name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _MAX_NAME:
            raise TypeError
        text = f"{module}.{name}"
        known = (
            text in _OTHER_NAMES
            or text in _STORAGE_DTYPES
            or _DTYPE_NAMES.fullmatch(text)
            or _CLASS_NAMES.fullmatch(text)
        )
        if not known or not name.isidentifier():
            raise not_allowed(text if text.isprintable() and len(text) < 100 else repr(text[:99]))
        self.stack.append(Name(text))

    def reduce(self, _: None) -> None:
        function, args = self.pop(2)
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise not_allowed("a call of something that is not a name")
        self.work.spend(len(args) + sum(len(arg) for arg in args if isinstance(arg, tuple)))
        call = _CALLS.get(function.text)
        self.stack.append(ObjectRecord(function.text, args) if call is None else call(*args))

    def build(self, _: None) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, ObjectRecord):
            for part in state if isinstance(state, tuple) else (state,):  # with __slots__: two mappings
                self.work.spend(1 + len(part) if isinstance(part, dict) else 1)
                if isinstance(part, dict):
                    target.state.update(part)
        elif not isinstance(target, dict):  # the _metadata of a state_dict
            raise not_allowed(f"a state for a {type(target).__name__}")


def _storage(identifier: Any) -> Storage:
    kind, name, key, _, count = identifier
    dtype = _STORAGE_DTYPES.get(name.text)
    if kind != "storage" or dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
        raise not_allowed("a reference that is not to a storage of numbers")
    return Storage(key, dtype, count)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    numbers = (offset, *shape, *stride)
    is_sized = all(type(number) is int and 0 <= number < _MAX_TENSOR_NUMBER for number in numbers)
    if not isinstance(storage, Storage) or not len(shape) == len(stride) <= _MAX_DIMENSIONS or not is_sized:
        raise not_allowed("a tensor without a storage, a shape and strides")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if prod(shape) > storage.count or (prod(shape) and last >= storage.count):
        raise CheckpointError(f"is damaged: a tensor of shape {list(shape)} does not fit {storage.count} numbers")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise not_allowed("a parameter that is not a tensor")
    return data


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    if any(args):
        raise not_allowed("an OrderedDict with arguments")
    return {}


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
}
_VALUES: dict[str, Callable[[Any], Any]] = {
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
_STEPS: dict[str, Callable[[_StackMachine, Any], Any]] = {
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _StackMachine.memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _StackMachine.get),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _StackMachine.reduce),
    "MARK": _StackMachine.mark,
    "POP": lambda machine, _: machine.pop(1),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "TUPLE": lambda machine, _: machine.push_tuple(machine.pop_to_mark()),
    "TUPLE1": lambda machine, _: machine.push_tuple(machine.pop(1)),
    "TUPLE2": lambda machine, _: machine.push_tuple(machine.pop(2)),
    "TUPLE3": lambda machine, _: machine.push_tuple(machine.pop(3)),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine.push_name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_name(*machine.pop(2)),
    "BINPERSID": lambda machine, _: machine.stack.append(_storage(*machine.pop(1))),
    "BUILD": _StackMachine.build,
}
