"""Exchange the names of two folders in one step; see `exchange`."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names of one file system, so that each always names one of the two.

    Returns:
        False if the system or the file system cannot do this in one step; nothing is changed then.

    Raises:
        OSError: One of them does not exist or cannot be renamed.

    Source:
        renameat2(2) with RENAME_EXCHANGE, Linux 3.15, glibc 2.28.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    try:
        rename = library.renameat2
    except AttributeError:  # another C library than glibc
        return False
    names = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    if rename(*names, _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))
