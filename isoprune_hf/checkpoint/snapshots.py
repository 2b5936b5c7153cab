"""Snapshots: saved states of a training or scoring run, from which it can be resumed.

`write_snapshot` writes a snapshot whole or not at all and keeps the two newest; `read_newest_snapshot` verifies and
reads them. A snapshot is a folder named by its position in the run: `0003-00000120` after 120 updates of epoch 3. It
contains `tensors.safetensors`, `values.json`, and `manifest.json` with the sizes and XXH3 digests of both.
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

from isoprune_hf.checkpoint.sync import sync_file, sync_folder
from isoprune_hf.errors import DamagedStateError

logger = get_logger(__name__)

_TENSORS, _VALUES, _MANIFEST = "tensors.safetensors", "values.json", "manifest.json"
_SNAPSHOTS_KEPT = 2
_CHUNK_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a run at one position.

    Args:
        epoch: Current epoch, counted from 1.
        update: Number of completed updates in this epoch.
        tensors: Tensors of the state by name, on the CPU.
        values: All other parts of the state, as JSON values.
    """

    epoch: int
    update: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the snapshot's folder; names sort in the order of positions."""
        return f"{self.epoch:04d}-{self.update:08d}"


def write_snapshot(folder: Path, snapshot: Snapshot, *, run: str) -> None:
    """Write a snapshot atomically and keep only the two newest.

    Args:
        folder: Folder of the run's snapshots.
        snapshot: State to write; an intact snapshot of the same position is kept instead.
        run: Digest of the run's settings and inputs; only a run with the same digest reads the snapshot.

    Raises:
        OSError: The snapshot cannot be written; existing snapshots are kept.
    """
    target = folder / snapshot.name
    if not (target.is_dir() and _damage(target) is None):
        _write_new(folder, snapshot, run)
    for old in _stored(folder)[:-_SNAPSHOTS_KEPT]:
        # Renamed before it is removed: a half-removed folder must not pass for a snapshot.
        os.rename(old, folder / f".{old.name}.old")
    remove_leftovers(folder)


def _write_new(folder: Path, snapshot: Snapshot, run: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / snapshot.name
    temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
    try:
        position = {"run": run, "epoch": snapshot.epoch, "update": snapshot.update}
        tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
        try:
            save_file(tensors, temporary / _TENSORS)
        except SafetensorError as error:  # for example a full disk
            raise OSError(str(error)) from error
        _write_json(temporary / _VALUES, {**snapshot.values, **position})
        files = {name: _measure(temporary / name) for name in (_TENSORS, _VALUES)}
        _write_json(temporary / _MANIFEST, {"files": files, "digest": _digest_of(files)})
        for name in (*files, _MANIFEST):
            sync_file(temporary / name)
        sync_folder(temporary)
        if target.is_dir():  # damaged
            os.rename(target, temporary.with_suffix(".old"))
        os.rename(temporary, target)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_newest_snapshot(folder: Path, *, run: str) -> Snapshot | None:
    """Read the newest intact snapshot of a run; newer, damaged ones are reported and renamed.

    Returns:
        The snapshot, or None if the run has not written any.

    Raises:
        DamagedStateError: The run has snapshots, but none is intact.
    """
    reasons: list[str] = []
    damaged: list[Path] = []
    for path in reversed(_stored(folder)):
        reason = _damage(path)
        values = {} if reason else _read_json(path / _VALUES)
        if reason is None and values["run"] != run:
            continue  # written by an earlier run in this folder
        if reason is None:
            snapshot = Snapshot(values["epoch"], values["update"], load_file(path / _TENSORS), values)
            if snapshot.name == path.name:
                for other in damaged:
                    logger.warning(f"{reasons.pop(0)}; continuing from {path.name}, the one before")
                    os.rename(other, other.with_name(f"damaged-{other.name}"))
                return snapshot
            reason = f"{path}: the content is that of {snapshot.name}"
        reasons.append(f"training state {reason}")
        damaged.append(path)
    if not reasons:
        return None
    raise DamagedStateError(
        f"none of the {len(reasons)} training states in {folder} is intact ({'; '.join(reasons)}); restore one from a "
        "copy, or start again with --overwrite true"
    )


def read_snapshot(folder: Path, epoch: int, update: int) -> Snapshot:
    """Read the snapshot of a position that another rank has found intact.

    Raises:
        DamagedStateError: The snapshot is not intact on this rank.
    """
    path = folder / Snapshot(epoch, update, {}, {}).name
    reason = _damage(path)
    if reason is not None:
        raise DamagedStateError(f"training state {reason} (only on this rank); all ranks must see the same files")
    return Snapshot(epoch, update, load_file(path / _TENSORS), _read_json(path / _VALUES))


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished and replaced snapshots; no other process may be writing to the folder."""
    for path in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
        shutil.rmtree(path, ignore_errors=True)


def remove_snapshots(folder: Path) -> None:
    """Remove all snapshots, including damaged ones."""
    for path in (*_stored(folder), *folder.glob("damaged-*")):
        shutil.rmtree(path, ignore_errors=True)


def has_snapshots(folder: Path) -> bool:
    """Return whether the folder contains a snapshot, intact or not."""
    return bool(_stored(folder))


def _stored(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*-[0-9]*") if path.is_dir())


def _damage(path: Path) -> str | None:
    """Return what is wrong with a snapshot, or None if it is intact."""
    try:
        manifest = _read_json(path / _MANIFEST)
        files = manifest["files"]
        if set(files) != {_TENSORS, _VALUES} or manifest["digest"] != _digest_of(files):
            return f"{path / _MANIFEST}: the content was changed"
        for name, measured in files.items():
            if _measure(path / name) != measured:
                return f"{path / name}: size or digest differs from the manifest"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError):  # any JSON but a manifest, or no JSON
        return f"{path / _MANIFEST}: not a valid manifest"
    return None


def _measure(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _digest_of(files: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
