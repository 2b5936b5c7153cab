"""Keep freed memory in the process: `keep_freed_memory`.

glibc asks the system for each large block and gives it back when it is freed, so that every pass through a network
faults in its activations page by page: for convolutional networks on a CPU a third to half of the time.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
_MMAP_BYTES = 2**26  # larger blocks are given back: kept, they would leave holes that nothing else fits into
_TRIM_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 64 MiB for the next use, instead of returning them to the system.

    The thresholds of a user stay: the variables `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` and
    `GLIBC_TUNABLES` are read by glibc itself.

    Returns:
        Whether the thresholds were set; they are not outside of Linux and without glibc.
    """
    is_set = any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"))
    if is_set or sys.platform != "linux":
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    return bool(set_option(_MMAP_THRESHOLD, _MMAP_BYTES) and set_option(_TRIM_THRESHOLD, _TRIM_BYTES))
