"""Places of results: checked and locked before any work, and replaced in one step that loses no file of others."""

import errno
import logging
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import contents

from isoprune_hf.checkpoint import target as target_module
from isoprune_hf.checkpoint.exchange import exchange
from isoprune_hf.checkpoint.folder import replace_file, replace_folder, update_folder, write_file
from isoprune_hf.checkpoint.target import Target, locked_target, open_target
from isoprune_hf.checkpoint.target_lock import TargetLock
from isoprune_hf.errors import CheckpointError, OccupiedError, RecipeError, WriteError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_new(folder: Path) -> None:
    (folder / "config.json").write_text("new")
    (folder / "weights").write_text("new")


def write_old(out: Path) -> None:
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "state").write_text("kept")
    (out / "config.json").write_text("old")
    (out / "extra").write_text("old")


def replace(target: Target) -> None:
    replace_folder(target, write_new)


def update(target: Target) -> None:
    """Change two files, and leave a third as it is."""

    def write(place: Path) -> None:
        write_file(place / "config.json", "new")
        write_file(place / "weights", "new")

    update_folder(target, write)


NEW = {"config.json": b"new", "weights": b"new"}
KEPT = {"checkpoints": None, "checkpoints/state": b"kept"}


@pytest.fixture(params=["exchange", "two renames"])
def is_atomic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether two folders can be exchanged in one step here; also without, as on other systems than Linux."""
    if request.param == "two renames":
        monkeypatch.setattr(target_module, "exchange", lambda first, second: False)
    return request.param == "exchange"


@pytest.mark.parametrize("keep", [None, pytest.param("checkpoints", marks=pytest.mark.kills)])
def test_new_folder_replaces_the_old(keep: str | None, is_atomic: bool, tmp_path: Path) -> None:
    write_old(tmp_path / "out")
    with open_target(tmp_path / "out", overwrite=True, keep=keep) as target:
        replace_folder(target, write_new)
        assert names(tmp_path) == {"out", ".out.lock"}
    assert contents(tmp_path / "out") == (NEW if keep is None else NEW | KEPT)
    assert names(tmp_path) == {"out"}


def test_exchange_needs_both_names(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "first", tmp_path / "second")
    (tmp_path / "second").write_text("x")
    assert exchange(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "first").read_text() == "x" and (tmp_path / "second").is_dir()


# --- the files of others

CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda out: (out / "notes.txt").write_text("mine"),
    "added below": lambda out: (out / "deep").mkdir() or (out / "deep" / "notes.txt").write_text("mine"),
    "replaced": lambda out: (out / "config.json").unlink() or (out / "config.json").write_text("mine"),
    "edited": lambda out: (out / "config.json").write_text("mine, and longer"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("keep", [None, "checkpoints"])
def test_files_added_by_others_are_kept(change: str, keep: str | None, is_atomic: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_old(out)
    with open_target(out, overwrite=True, keep=keep) as target:
        CHANGES[change](out)
        before = contents(out)
        with pytest.raises(WriteError):
            replace_folder(target, write_new)
    assert contents(out) == before
    assert contents(tmp_path / "out-1") == NEW  # the work is not lost either
    assert names(tmp_path) == {"out", "out-1"}


@pytest.mark.parametrize("has_folder", [True, False])
def test_folder_made_by_others_is_kept(has_folder: bool, tmp_path: Path) -> None:
    out = tmp_path / "out.v1"
    if has_folder:
        out.mkdir()
    with open_target(out, overwrite=False) as target:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")
        with pytest.raises(WriteError):
            replace_folder(target, write_new)
    assert contents(out) == {"notes.txt": b"mine"}
    assert names(tmp_path) == {"out.v1", "out-1.v1"}


def test_files_added_in_the_last_moment_stay(is_atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_old(out)
    with open_target(out, overwrite=True) as target:
        monkeypatch.setattr(type(target), "_check_unchanged", lambda *_: (out / "notes.txt").write_text("mine"))
        replace_folder(target, write_new)
    assert contents(out) == NEW
    assert (tmp_path / "out-1" / "notes.txt").read_text() == "mine"


def test_file_made_by_others_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "scores.safetensors"
    with open_target(out, overwrite=True, is_file=True) as target:
        out.write_text("mine")
        with pytest.raises(WriteError):
            replace_file(target, lambda path: path.write_text("new"))
    assert contents(tmp_path) == {"scores.safetensors": b"mine", "scores-1.safetensors": b"new"}


def test_files_removed_by_others_are_no_obstacle(tmp_path: Path) -> None:
    write_old(tmp_path / "out")
    with open_target(tmp_path / "out", overwrite=True) as target:
        (tmp_path / "out" / "extra").unlink()
        replace_folder(target, write_new)
    assert contents(tmp_path / "out") == NEW


def test_inputs_of_a_command_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_old(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    with open_target("out", overwrite=True) as target:
        for place in ("out", tmp_path / "out", "out/config.json", "out/checkpoints", "link", "link/state"):
            with pytest.raises(RecipeError, match=r"^--output out contains --model "):
                target.check_inputs({"--scores": None, "--model": str(place)})
        target.check_inputs({"--model": "timm/out", "data": "out/missing", "base": str(tmp_path), "": "."})
        target.check_inputs({"cache": "missing"}, are_places=True)
        with pytest.raises(RecipeError, match="contains cache"):
            target.check_inputs({"cache": "out/missing"}, are_places=True)


def test_locks_of_commands_below_are_no_change(tmp_path: Path) -> None:
    with open_target(tmp_path / "out", overwrite=False) as target:
        (tmp_path / "out" / "model").mkdir(parents=True)
        (tmp_path / "out" / ".model.lock").touch()
        replace_folder(target, write_new)
    assert contents(tmp_path / "out") == NEW


# --- one writer


def test_second_writer_is_refused_and_harmless(tmp_path: Path) -> None:
    with open_target(tmp_path / "a" / "out", overwrite=False):
        with pytest.raises(OccupiedError, match=f"process {os.getpid()} on "), locked_target(tmp_path / "a" / "out"):
            raise AssertionError("two processes have the lock")
        with open_target(tmp_path / "a" / "other", overwrite=False):
            pass
        with pytest.raises(OccupiedError):
            replace_folder(tmp_path / "a" / "out", write_new)
        assert names(tmp_path / "a") == {".out.lock"}
    assert names(tmp_path) == set()


def test_result_of_the_writer_before_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that waits between its check and its lock does not replace what another has written meanwhile."""
    acquire = TargetLock.acquire

    def write_first(lock: TargetLock, what: str, **options: float) -> None:
        monkeypatch.setattr(TargetLock, "acquire", acquire)
        replace_folder(tmp_path / "out", write_new)
        acquire(lock, what, **options)

    monkeypatch.setattr(TargetLock, "acquire", write_first)
    with pytest.raises(RecipeError), open_target(tmp_path / "out", overwrite=False):
        raise AssertionError("the result of another is replaced")
    assert contents(tmp_path) == {"out": None, **{f"out/{name}": text for name, text in NEW.items()}}


def test_other_ranks_check_without_locking(tmp_path: Path) -> None:
    with locked_target(tmp_path / "out"), open_target(tmp_path / "out", overwrite=False, is_writer=False) as target:
        assert target.path == tmp_path / "out"


# --- kills


def kill_in_writing(out: Path, call: int, keep: str | None, write: Callable[[Target], None], is_atomic: bool) -> bool:
    """Write a folder in a process that is killed before its n-th renaming or removal; False if it has ended."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call_or_end(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call_or_end

        for name in ("rename", "replace", "rmdir", "unlink", "mkdir", "link"):
            setattr(os, name, counted(getattr(os, name)))
        if is_atomic:
            target_module.exchange = counted(exchange)
        with open_target(out, overwrite=True, keep=keep) as target:
            write(target)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    "is_atomic", ["exchange", pytest.param("two renames", marks=pytest.mark.kills)], indirect=True
)
@pytest.mark.parametrize(
    "write, keep",
    [
        (replace, None),
        pytest.param(replace, "checkpoints", marks=pytest.mark.kills),
        (update, "checkpoints"),
        pytest.param(update, None, marks=pytest.mark.faults),
    ],
)
def test_kill_at_each_step_leaves_old_or_new(
    write: Callable[[Target], None], keep: str | None, is_atomic: bool, tmp_path: Path
) -> None:
    """Files that belong together change together, for a reader after the kill and for the next command."""
    out = tmp_path / "out"
    old = {"config.json": b"old", "extra": b"old"}
    new = NEW if write is replace else NEW | {"extra": b"old"}
    found = []
    for call in range(1, 60):
        shutil.rmtree(out, ignore_errors=True)
        write_old(out)
        has_ended = not kill_in_writing(out, call, keep, write, is_atomic)
        if is_atomic:  # also before the next command has cleaned
            seen = contents(out)
            assert {name: text for name, text in seen.items() if name not in KEPT} in (old, new)
        with locked_target(out) as target:
            assert names(tmp_path) == {"out", ".out.lock"}, call
            seen = contents(target.real)
        found.append({name: text for name, text in seen.items() if name not in KEPT})
        if keep is not None or write is update:
            assert seen.items() >= KEPT.items(), call
        if has_ended:
            break
    assert has_ended and call > 4
    assert old in found and new in found and all(files in (old, new) for files in found)


def test_leftovers_of_other_results_stay(tmp_path: Path) -> None:
    for name in (".out.v2.abcdefgh.tmp", ".out.scoring-0", ".outer.abcdefgh.tmp", "out.abcdefgh.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcdefgh.tmp").mkdir()
    with open_target(tmp_path / "out", overwrite=False):
        pass
    assert names(tmp_path) == {".out.v2.abcdefgh.tmp", ".out.scoring-0", ".outer.abcdefgh.tmp", "out.abcdefgh.tmp"}


def test_links_among_leftovers_are_not_followed(tmp_path: Path) -> None:
    write_old(tmp_path / "other")
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.abcdefgh.tmp").symlink_to("other")
    with locked_target(tmp_path / "out"):
        pass
    assert (tmp_path / "other" / "checkpoints").is_dir() and names(tmp_path / "out") == set()


def test_failed_rename_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "exchange", lambda first, second: False)
    ordinary = os.rename
    for keep in (None, "checkpoints"):
        for failing in range(3 if keep else 2):
            out = tmp_path / f"{keep}-{failing}" / "out"
            write_old(out)
            held, calls = contents(out), []

            def rename_once_not(source: Path, place: Path, failing: int = failing, calls: list = calls) -> None:
                calls.append(source)
                if len(calls) == failing + 1:
                    raise OSError(errno.EBUSY, "Device or resource busy")
                ordinary(source, place)

            monkeypatch.setattr(os, "rename", rename_once_not)
            with pytest.raises(CheckpointError), open_target(out, overwrite=True, keep=keep) as target:
                replace_folder(target, write_new)
            monkeypatch.setattr(os, "rename", ordinary)
            assert len(calls) > failing
            assert contents(out) == held and names(out.parent) == {"out"}


def test_interrupted_exchange_loses_no_kept_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Path) -> bool:
        raise KeyboardInterrupt

    write_old(tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(target_module, "exchange", interrupt)
    with pytest.raises(KeyboardInterrupt), open_target(tmp_path / "out", overwrite=True, keep="checkpoints") as target:
        replace_folder(target, write_new)
    assert contents(tmp_path) == before


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with open_target(tmp_path / "link", overwrite=False) as target:
        replace_folder(target, write_new)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk") == NEW


# --- a change of some files


def test_update_leaves_other_files_as_they_are(is_atomic: bool, tmp_path: Path) -> None:
    """Bytes, permissions, links, folders, and the numbers by which the system knows the files."""
    out = tmp_path / "out"
    write_old(out)
    (out / ".git" / "objects").mkdir(parents=True)
    (out / ".git" / "objects" / "1").write_text("git")
    (out / "blob").symlink_to("extra")
    (out / "lost").symlink_to("missing")
    (out / "extra").chmod(0o600)
    out.chmod(0o750)
    before = {name: (out / name).lstat() for name in ("extra", "blob", "lost", ".git/objects/1", "checkpoints/state")}
    with locked_target(out, keep="checkpoints") as target:
        update(target)
    assert names(tmp_path) == {"out"} and names(out) == {
        *("checkpoints", "config.json", "weights", "extra", ".git", "blob", "lost")
    }
    assert [(out / name).read_text() for name in ("config.json", "weights")] == ["new", "new"]
    assert (out / "blob").readlink() == Path("extra") and stat.S_IMODE(out.stat().st_mode) == 0o750
    for name, status in before.items():
        found = (out / name).lstat()
        assert (found.st_mode, found.st_mtime_ns) == (status.st_mode, status.st_mtime_ns), name
        assert found.st_ino == status.st_ino or stat.S_ISLNK(status.st_mode)


def test_update_without_hard_links_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_old(tmp_path / "out")
    with locked_target(tmp_path / "out") as target:
        update(target)
    assert contents(tmp_path / "out") == NEW | KEPT | {"extra": b"old"}


def test_failed_update_changes_nothing(tmp_path: Path) -> None:
    def write(place: Path) -> None:
        write_file(place / "config.json", "new")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_old(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(WriteError), locked_target(tmp_path / "out") as target:
        update_folder(target, write)
    assert contents(tmp_path) == before


def test_current_folder_is_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    out = tmp_path / "out"
    write_old(out)
    monkeypatch.chdir(out)
    with caplog.at_level(logging.WARNING), locked_target(".") as target:
        update(target)
    assert Path("config.json").read_text(encoding="utf-8") == "new" and Path.cwd() == out
    assert [str(out) in record.getMessage() for record in caplog.records] == [True]


def test_mount_point_is_refused_before_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_old(tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(WriteError), locked_target(tmp_path / "out") as target:
        update_folder(target, lambda place: pytest.fail("it is written"))


def test_replaced_folder_stays_private(tmp_path: Path) -> None:
    write_old(tmp_path / "out")
    (tmp_path / "out").chmod(0o700)
    replace_folder(tmp_path / "out", write_new)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
