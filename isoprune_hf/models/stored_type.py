"""Build a module in the type in which its weights are stored, as transformers does: `stored_type`, `default_type`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}  # by the names that safetensors uses


def stored_type(place: str, revision: str | None = None) -> torch.dtype:
    """Return the type of the weights in a folder or Hub repository; float32 unless all are in one half precision."""
    try:
        with safe_open(cached_file(place, "model.safetensors", revision=revision), framework="pt") as opened:
            found = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # other files, or damaged ones, which the loader reports
        return torch.float32
    floats = {name for name in found if "F" in name}
    return _HALF.get(floats.pop(), torch.float32) if len(floats) == 1 else torch.float32


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Set the type that new floating-point tensors have, within the context: also those that are not saved."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
