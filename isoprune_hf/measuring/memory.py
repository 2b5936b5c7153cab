"""How much memory a forward pass takes."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoprune_hf.measuring.speed import Precision, draw_images, with_precision


def peak_memory(
    model: nn.Module, image_size: Sequence[int], *, batch_size: int = 1, precision: Precision = "no"
) -> int:
    """Measure the most bytes that lie in tensors at once in an eager forward pass, weights included.

    On a GPU it is what the allocator says; on a CPU every tensor that an operator gives is followed, and what an
    operator uses inside is not seen.

    Args:
        model: The model in eval mode, on its device; left untouched.
        image_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        precision: As in `measure_latency`.
    """
    copied = with_precision(model, precision)
    pixels = draw_images(copied, image_size, batch_size)
    weights = sum(tensor.nbytes for tensor in (*copied.parameters(), *copied.buffers()))
    with torch.no_grad():
        if pixels.is_cuda:
            before = torch.cuda.memory_allocated(pixels.device)
            torch.cuda.reset_peak_memory_stats(pixels.device)
            copied(pixels)
            return weights + pixels.nbytes + torch.cuda.max_memory_allocated(pixels.device) - before
        counted = _LiveBytes()
        with counted:
            copied(pixels)
    return weights + pixels.nbytes + counted.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            storage = leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None
            # A view, or what was written in place, is no new memory.
            if storage is not None and storage._cdata not in given and storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return output

    def _free(self, size: int) -> None:
        self.live -= size
