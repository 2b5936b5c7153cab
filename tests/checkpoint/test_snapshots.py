"""Snapshots are read exactly as written, and damage is found and named."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from isoprune_hf.checkpoint import snapshots
from isoprune_hf.checkpoint.snapshots import Snapshot, read_newest_snapshot, read_snapshot, write_snapshot
from isoprune_hf.errors import DamagedStateError

ACCELERATOR = Accelerator(cpu=True)  # the log of ranks needs one
FILES = ("tensors.safetensors", "values.json", "manifest.json")


def make(epoch: int, update: int) -> Snapshot:
    tensors = {"a": torch.full((3, 2), float(update)), "step": torch.tensor(epoch), "t": torch.arange(6).view(2, 3).T}
    return Snapshot(epoch, update, tensors, {"losses": 0.1 + update, "history": [{"epoch": 0}]})


def write(folder: Path, *places: tuple[int, int], run: str = "r") -> list[Path]:
    for place in places:
        write_snapshot(folder, make(*place), run=run)
    return [folder / make(*place).name for place in places]


def assert_is(found: Snapshot | None, epoch: int, update: int) -> None:
    assert found is not None and (found.epoch, found.update) == (epoch, update)
    made = make(epoch, update)
    assert found.values.items() >= made.values.items()
    assert found.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in made.tensors.items())


def test_newest_snapshot_is_read_and_two_are_kept(tmp_path: Path) -> None:
    assert read_newest_snapshot(tmp_path, run="r") is None
    paths = write(tmp_path, (1, 9), (1, 10), (2, 3))
    assert_is(read_newest_snapshot(tmp_path, run="r"), 2, 3)
    assert sorted(tmp_path.iterdir()) == paths[1:]
    assert {path.name for path in paths[2].iterdir()} == set(FILES)
    assert_is(read_snapshot(tmp_path, 1, 10), 1, 10)


def test_every_changed_byte_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = write(tmp_path / "whole", (1, 1), (1, 2))
    for name in FILES:
        size = (newer / name).stat().st_size
        for at in {0, size // 3, size // 2, size - 2}:
            folder = shutil.copytree(tmp_path / "whole", tmp_path / f"{name}{at}")
            content = bytearray((folder / newer.name / name).read_bytes())
            content[at] ^= 1
            (folder / newer.name / name).write_bytes(content)
            caplog.clear()
            assert_is(read_newest_snapshot(folder, run="r"), 1, 1)
            assert name in caplog.text and f"continuing from {older.name}" in caplog.text
            assert (folder / f"damaged-{newer.name}").is_dir()
            # What is set aside takes no place of the two that are kept.
            write(folder, (1, 2), (1, 3))
            assert_is(read_newest_snapshot(folder, run="r"), 1, 3)


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "swapped", "exchanged", "manifest of all"])
def test_damaged_snapshot_falls_back_to_previous(damage: str, tmp_path: Path) -> None:
    older, newer = write(tmp_path, (1, 1), (1, 2))
    tensors = newer / "tensors.safetensors"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "emptied":
        tensors.write_bytes(b"")
    elif damage == "removed":
        tensors.unlink()
    elif damage == "swapped":
        shutil.copy(older / "tensors.safetensors", tensors)
    elif damage == "exchanged":  # a whole snapshot under the name of a later one
        shutil.rmtree(newer)
        shutil.copytree(older, newer)
    else:
        (newer / "manifest.json").write_text("[]")
    assert_is(read_newest_snapshot(tmp_path, run="r"), 1, 1)


def test_all_damaged_snapshots_are_named(tmp_path: Path) -> None:
    for path in write(tmp_path, (1, 1), (1, 2)):
        (path / "values.json").write_text("{}")
    with pytest.raises(DamagedStateError, match=r"\b2 .*0001-00000002/values\.json: "):
        read_newest_snapshot(tmp_path, run="r")
    with pytest.raises(DamagedStateError, match=r"0001-00000002/values.json: "):
        read_snapshot(tmp_path, 1, 2)


def test_another_run_ignores_the_snapshots(tmp_path: Path) -> None:
    write(tmp_path, (1, 1), run="other")
    assert read_newest_snapshot(tmp_path, run="r") is None
    write(tmp_path, (1, 2), run="r")
    assert_is(read_newest_snapshot(tmp_path, run="r"), 1, 2)


@pytest.mark.parametrize("call", range(8))
def test_full_disk_keeps_existing_snapshots(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, (1, 1), (1, 2))
    calls = []

    def watch(name: str, of: object) -> None:
        function = getattr(of, name)

        def failing(*args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) == call + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        monkeypatch.setattr(of, name, failing)

    watch("save_file", snapshots)
    watch("_write_json", snapshots)
    watch("fsync", os)
    watch("rename", os)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, (1, 3))
    monkeypatch.undo()
    assert_is(read_newest_snapshot(tmp_path, run="r"), *((1, 2) if calls[-1] != "fsync" or call < 7 else (1, 3)))
    assert not list(tmp_path.glob(".*.tmp"))
    write(tmp_path, (1, 3))
    assert_is(read_newest_snapshot(tmp_path, run="r"), 1, 3)


def test_manifest_contains_file_sizes(tmp_path: Path) -> None:
    (path,) = write(tmp_path, (1, 1))
    manifest = json.loads((path / "manifest.json").read_text())
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert sizes == {name: (path / name).stat().st_size for name in FILES[:2]}
