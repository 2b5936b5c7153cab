"""Read the zip file that torch.save writes: its content as data, and single tensors on request."""

import zipfile
from pathlib import Path
from typing import Any, Self

import torch

from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.legacy.pickle_reader import StoredTensor, read_pickle
from isoprune_hf.limits import MAX_PICKLE_BYTES

# Errors of zipfile for a damaged, cut off or unsupported file.
_ZIP_ERRORS = (EOFError, NotImplementedError, OSError, RuntimeError, ValueError, zipfile.BadZipFile)


class LegacyArchive:
    """A file of torch.save, open for reading.

    Args:
        path: The file.

    Raises:
        RecipeError: The file does not exist.
        CheckpointError: The file was not written by torch.save, is damaged, or is larger inside than outside.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise RecipeError("does not exist, or is not a file")
        if is_safetensors(path):
            raise RecipeError(
                "is a safetensors file: it contains weights and no module to convert; name their architecture with "
                f"--prune.model, such as timm/resnet50, and use the file with --prune.weights {path}"
            )
        try:
            self._file = zipfile.ZipFile(path)
        except _ZIP_ERRORS as error:
            raise CheckpointError(
                "is not a complete zip file of torch.save: it is cut off or damaged, or was written by torch before "
                "1.6; if you trust it, load it and save it again with a later torch"
            ) from error
        self._storages: dict[str, bytearray] = {}
        try:
            self._prefix, self._sizes = _check_entries(self._file.infolist(), path.stat().st_size)
            if "byteorder" in self._sizes and self._read("byteorder") != b"little":
                raise CheckpointError("was written on a big-endian machine, which is not supported")
        except CheckpointError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def content(self) -> Any:
        """Return the saved object as plain values and records, see `read_pickle`."""
        return read_pickle(self._read("data.pkl"))

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: The file does not contain all of its numbers.
        """
        storage = stored.storage
        name = f"data/{storage.key}"
        size = storage.count * storage.dtype.itemsize
        if self._sizes.get(name) != size:
            raise CheckpointError(f"is damaged: {name!r:.99} does not have the {size} bytes of its tensor")
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
        except _ZIP_ERRORS as error:
            raise CheckpointError(f"is damaged: its entry {name!r:.99} cannot be read") from error


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors does: with the length of a JSON object and the object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> tuple[str, dict[str, int]]:
    """Return the folder inside the file, and the sizes of its entries in bytes."""
    roots = [entry.filename.removesuffix("data.pkl") for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(roots) != 1 or roots[0].count("/") != 1:
        raise CheckpointError("is a zip file, but not of torch.save: it must contain one folder with one data.pkl")
    if any(entry.filename == f"{roots[0]}constants.pkl" for entry in entries):
        raise CheckpointError(
            "is a TorchScript program, which cannot be read without running it; save the module itself"
        )
    sizes: dict[str, int] = {}
    for entry in entries:
        name = entry.filename.removeprefix(roots[0])
        plain = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
        if not plain or entry.flag_bits & 1 or name in sizes:
            raise CheckpointError(
                f"contains the entry {name!r:.99} compressed, encrypted or twice, as torch.save does not"
            )
        sizes[name] = entry.file_size
    if sum(sizes.values()) > size or sizes["data.pkl"] > MAX_PICKLE_BYTES:
        raise CheckpointError("is larger inside than torch.save could have written")
    return roots[0], sizes
