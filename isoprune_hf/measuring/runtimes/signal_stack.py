"""Keep the stack on which the signals of a thread are handled: `kept_signal_stack`."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restore the alternate signal stack of the thread in the end, on Linux.

    Each CPU plugin of OpenVINO puts a stack of its own in place and notes the one before. When it ends it frees its
    own, and puts back the noted one if its own is still in place. So of two that end in the order in which they began,
    the second puts back the freed stack of the first, and the next signal kills the process, such as SIGCHLD where a
    data loader listens to it.
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)
