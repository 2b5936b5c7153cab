"""Store tensors where there is room: on their device, in host memory, or in files (`Storage`).

A file is mapped into memory and its name removed at once, so it is gone when its tensor is, whatever ends the process;
the system writes its pages to the disk when memory is needed. Where a tensor is stored changes no bit of it.
"""

import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import torch
from accelerate import Accelerator

from isoprune_hf.measuring.memory import free_memory


class Keep(Protocol):
    """Stores a tensor."""

    def __call__(self, tensor: torch.Tensor, *, is_copied: bool = True) -> torch.Tensor:
        """Return the stored tensor: `tensor` itself only if it may be, is in place and no part of a larger one."""


_HOST = torch.device("cpu")
_LEFT_FREE = 4  # one of so many parts of a memory or disk
_SMALL = 8  # one of so many parts of what is free may be used even so


@dataclass(frozen=True)
class Storage:
    """Room for tensors of one rank.

    Args:
        device: The device on which the tensors are computed.
        ranks: Number of processes that share the memory.
        always: Bytes that are stored on the device even if memory is short, as those of a single batch.
    """

    device: torch.device
    ranks: int = 1
    always: int = 0

    @classmethod
    def of_ranks(cls, device: torch.device, accelerator: Accelerator | None) -> Self:
        """Return the room for a rank of an accelerator, or of one process."""
        return cls(device, 1 if accelerator is None else accelerator.num_processes)

    def place(self, size: int) -> Keep | None:
        """Return a function that stores tensors; None if there is no room for so many bytes in all."""
        if size <= self.always:
            return partial(_keep_on, self.device)
        for device in dict.fromkeys((self.device, _HOST)):
            if size <= self._room(*free_memory(device)):
                return partial(_keep_on, device)
        return _copy_to_file if size <= self._room(*_free_disk()) else None

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the host itself, or a copy in a file if memory is short."""
        if tensor.nbytes <= self._room(*free_memory(_HOST)) or tensor.nbytes > self._room(*_free_disk()):
            return tensor
        return _copy_to_file(tensor)

    def _room(self, free: int, total: int) -> int:
        return max(free - total // _LEFT_FREE, free // _SMALL) // self.ranks


def _free_disk() -> tuple[int, int]:
    """Return the free and all bytes of the disk of temporary files."""
    usage = shutil.disk_usage(tempfile.gettempdir())
    return usage.free, usage.total


def _keep_on(device: torch.device, tensor: torch.Tensor, *, is_copied: bool = True) -> torch.Tensor:
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.to(device, copy=is_copied or is_part)


def _copy_to_file(tensor: torch.Tensor, *, is_copied: bool = True) -> torch.Tensor:
    """Return a copy of a tensor in a file that has no name."""
    if not tensor.nbytes:
        return tensor.to(_HOST, copy=True)
    with tempfile.TemporaryDirectory(prefix="isoprune-", ignore_cleanup_errors=True) as folder:
        file = str(Path(folder, "outputs"))
        copied = torch.from_file(file, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return copied.view(tensor.shape).copy_(tensor)
