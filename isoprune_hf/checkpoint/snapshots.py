"""Snapshots of a training on disk: written whole or not at all, verified when read, and never fewer than two.

A snapshot is a folder named by the place in the training, as `0003-00000120`: 120 updates of epoch 3 are done. In it
are `tensors.safetensors`, `values.json` and `manifest.json`, which holds the size and the XXH3 digest of both.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isoprune_hf.errors import DamagedStateError

logger = get_logger(__name__)

_TENSORS, _VALUES, _MANIFEST = "tensors.safetensors", "values.json", "manifest.json"
_KEPT = 2
_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A moment of a training.

    Args:
        epoch: Counted from 1.
        update: Updates of this epoch that are done.
        tensors: All tensors by name, on the CPU.
        values: The rest, as JSON holds it.
    """

    epoch: int
    update: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of its folder; later ones sort behind earlier ones."""
        return f"{self.epoch:04d}-{self.update:08d}"


def write_snapshot(folder: Path, snapshot: Snapshot, *, run: str) -> None:
    """Write a snapshot, then remove all but the two newest; what a kill leaves half-written is never read.

    Args:
        folder: Holds the snapshots of a run.
        snapshot: What to write; one that is there for the same place and intact stays.
        run: Digest of what the run trains, so that no other run takes the snapshot for its own.

    Raises:
        OSError: It cannot be written; those that were there stay.
    """
    target = folder / snapshot.name
    if not (target.is_dir() and _damage(target) is None):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
        try:
            place = {"run": run, "epoch": snapshot.epoch, "update": snapshot.update}
            tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
            try:
                save_file(tensors, temporary / _TENSORS)
            except SafetensorError as error:  # a full disk, for one
                raise OSError(str(error)) from error
            _write_json(temporary / _VALUES, {**snapshot.values, **place})
            files = {name: _measure(temporary / name) for name in (_TENSORS, _VALUES)}
            _write_json(temporary / _MANIFEST, {"files": files, "digest": _digest_of(files)})
            for name in (*files, _MANIFEST, ""):
                _sync(temporary / name)
            if target.is_dir():  # damaged
                os.rename(target, temporary.with_suffix(".old"))
            os.rename(temporary, target)
            _sync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in _stored(folder)[:-_KEPT]:
        # Out of sight first: what is removed by halves has no manifest that could be trusted.
        os.rename(old, folder / f".{old.name}.old")
    clean(folder)


def read_newest(folder: Path, *, run: str) -> Snapshot | None:
    """Read the newest intact snapshot of a run; damaged ones get a warning, and are set aside.

    Returns:
        None where the run has written none.

    Raises:
        DamagedStateError: There are some, and none is intact.
    """
    reasons: list[str] = []
    damaged: list[Path] = []
    for path in reversed(_stored(folder)):
        reason = _damage(path)
        values = {} if reason else json.loads((path / _VALUES).read_text())
        if reason is None and values["run"] != run:
            continue  # of a run that this one replaces
        if reason is None:
            snapshot = Snapshot(values["epoch"], values["update"], load_file(path / _TENSORS), values)
            if snapshot.name == path.name:
                for other in damaged:
                    logger.warning(f"{reasons.pop(0)}; continuing from {path.name} before it")
                    os.rename(other, other.with_name(f"damaged-{other.name}"))
                return snapshot
            reason = f"{path}: it is that of {snapshot.name}"
        reasons.append(f"training state {reason}")
        damaged.append(path)
    if not reasons:
        return None
    raise DamagedStateError(
        f"none of the {len(reasons)} training states in {folder} is intact ({'; '.join(reasons)}); put one back from "
        "a copy, or begin anew with --overwrite true"
    )


def read_snapshot(folder: Path, epoch: int, update: int) -> Snapshot:
    """Read the snapshot of a place, which another rank has found intact.

    Raises:
        DamagedStateError: It is not intact here.
    """
    path = folder / Snapshot(epoch, update, {}, {}).name
    reason = _damage(path)
    if reason is not None:
        raise DamagedStateError(f"training state {reason}, on this rank alone; all ranks must see the same files")
    return Snapshot(epoch, update, load_file(path / _TENSORS), json.loads((path / _VALUES).read_text()))


def clean(folder: Path) -> None:
    """Remove what is out of use or was never finished; nobody else may be writing."""
    for path in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
        shutil.rmtree(path, ignore_errors=True)


def remove_all(folder: Path) -> None:
    """Remove the snapshots, damaged ones too."""
    for path in (*_stored(folder), *folder.glob("damaged-*")):
        shutil.rmtree(path, ignore_errors=True)


def has_snapshots(folder: Path) -> bool:
    """Say whether any snapshot, intact or not, is there."""
    return bool(_stored(folder))


def _stored(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*-[0-9]*") if path.is_dir())


def _damage(path: Path) -> str | None:
    """Say what is wrong with a snapshot; None where it is intact."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        files = manifest["files"]
        if set(files) != {_TENSORS, _VALUES} or manifest["digest"] != _digest_of(files):
            return f"{path / _MANIFEST}: it was changed"
        for name, measured in files.items():
            if _measure(path / name) != measured:
                return f"{path / name}: size or digest is not that of the manifest"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{path / _MANIFEST}: it is no manifest"
    return None


def _measure(path: Path) -> dict[str, Any]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _digest_of(files: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
