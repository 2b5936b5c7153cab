"""The zip file that torch.save writes: its description as data, and its tensors, read when they are asked for."""

import zipfile
from pathlib import Path
from typing import Any, Self

import torch

from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.legacy.inert import StoredTensor, read_inert

_LARGEST_PICKLE = 16 * 2**20  # bytes: that of a ResNet-152 with its average and AdamW has 0.6 MB
_BROKEN = (EOFError, NotImplementedError, OSError, RuntimeError, ValueError, zipfile.BadZipFile)


class LegacyArchive:
    """A file of torch.save, open for reading.

    Args:
        path: The file.

    Raises:
        RecipeError: There is no such file.
        CheckpointError: It is no zip file of torch.save, damaged, or larger inside than outside.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise RecipeError("is no file")
        try:
            self._file = zipfile.ZipFile(path)
        except _BROKEN as error:
            raise CheckpointError(
                "is no whole zip file of torch.save: it is cut off or damaged, or was written by torch before 1.6, "
                "whose format is not read; where you trust it, load it and save it again with a later torch"
            ) from error
        self._storages: dict[str, bytearray] = {}
        try:
            self._prefix, self._sizes = _check_entries(self._file.infolist(), path.stat().st_size)
            if "byteorder" in self._sizes and self._read("byteorder") != b"little":
                raise CheckpointError("was written on a big-endian machine, whose numbers are not read")
        except CheckpointError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def content(self) -> Any:
        """Give what was saved, as plain values and records; see `read_inert`."""
        return read_inert(self._read("data.pkl"))

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """Read a tensor into memory of its own.

        Raises:
            CheckpointError: Its numbers are not in the file.
        """
        storage = stored.storage
        name, size = f"data/{storage.key}", storage.count * storage.dtype.itemsize
        if self._sizes.get(name) != size:
            raise CheckpointError(f"is damaged: {name!r:.99} does not hold the {size} bytes that its tensor needs")
        if not size:
            return torch.empty(stored.shape, dtype=storage.dtype)
        if storage.key not in self._storages:
            self._storages[storage.key] = bytearray(self._read(name))
        numbers = torch.frombuffer(self._storages[storage.key], dtype=storage.dtype)
        view = numbers.as_strided(stored.shape, stored.stride, stored.offset)
        return view.clone(memory_format=torch.contiguous_format)

    def _read(self, name: str) -> bytes:
        try:
            return self._file.read(f"{self._prefix}{name}")
        except _BROKEN as error:
            raise CheckpointError(f"is damaged: its entry {name!r:.99} cannot be read") from error


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> tuple[str, dict[str, int]]:
    """Give the folder inside the file, and the sizes of the entries in it."""
    roots = [entry.filename.removesuffix("data.pkl") for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(roots) != 1 or roots[0].count("/") != 1:
        raise CheckpointError("is a zip file, but none of torch.save: it must hold one data.pkl in one folder")
    if any(entry.filename == f"{roots[0]}constants.pkl" for entry in entries):
        raise CheckpointError("is a TorchScript program, which cannot be read without running it; save the module")
    sizes: dict[str, int] = {}
    for entry in entries:
        name = entry.filename.removeprefix(roots[0])
        plain = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
        if not plain or entry.flag_bits & 1 or name in sizes:
            raise CheckpointError(f"holds the entry {name!r:.99} compressed, encrypted or twice: not of torch.save")
        sizes[name] = entry.file_size
    if sum(sizes.values()) > size or sizes["data.pkl"] > _LARGEST_PICKLE:
        raise CheckpointError("is larger inside than torch.save could have written it")
    return roots[0], sizes
