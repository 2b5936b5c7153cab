"""Measure how much memory a forward pass needs (`peak_memory`), and how much is free (`free_memory`)."""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

# The hook below Python's autograd and the walk through nested arguments have no public name in torch 2.14.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoprune_hf.measuring.images import draw_images, in_dtype
from isoprune_hf.recipes.values import DType

_CGROUP = Path("/sys/fs/cgroup")  # of this process, in a container


def peak_memory(
    model: nn.Module, image_size: Sequence[int], *, batch_size: int = 1, dtype: DType | None = None
) -> int:
    """Measure the largest number of bytes held by tensors at any time of an eager forward pass, weights included.

    On a GPU this is the count of the allocator. On a CPU the outputs of all operators are counted; buffers that an
    operator allocates internally are not.

    Args:
        model: The model in eval mode, on its device; it is not changed.
        image_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        dtype: Dtype of weights and images; None is the model's own.
    """
    copied = in_dtype(model, dtype)
    pixels = draw_images(copied, image_size, batch_size)
    weights = sum(tensor.nbytes for tensor in (*copied.parameters(), *copied.buffers()))
    with torch.no_grad():
        if pixels.is_cuda:
            before = torch.cuda.memory_allocated(pixels.device)
            torch.cuda.reset_peak_memory_stats(pixels.device)
            copied(pixels)
            return weights + pixels.nbytes + torch.cuda.max_memory_allocated(pixels.device) - before
        counter = _TensorBytesCounter()
        with counter:
            copied(pixels)
    return weights + pixels.nbytes + counter.peak


def free_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and all bytes of the memory of a device; that of the host ends at the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    limit, used = (_read_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return (free, total) if limit is None or used is None else (min(free, limit - used), min(total, limit))


def _read_number(file: Path) -> int | None:
    """Return the number in a file of the system; None if there is none."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


class _TensorBytesCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its hooks untyped
    """Counts the bytes of operator outputs while they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.live = 0
        self.peak = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), inputs)
        return output

    def _count(self, storage: torch.UntypedStorage, inputs: set[torch.UntypedStorage]) -> None:
        # A view of an input, or an input written in place, takes no new memory.
        if storage in inputs or storage in self._counted:
            return
        self._counted.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size
