"""The place where a command writes its result: checked, locked and kept apart from the files of others.

`open_target` checks and locks it before any work. The result is written next to it and takes its name in one step, so
a killed command leaves the old result or the new one; the next command removes what a killed one has left.
"""

import itertools
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from isoprune_hf.checkpoint.exchange import exchange
from isoprune_hf.checkpoint.output_check import MODEL_MARKS, check_output
from isoprune_hf.checkpoint.sync import sync_folder
from isoprune_hf.checkpoint.target_lock import TargetLock
from isoprune_hf.errors import ConflictError, RecipeError, WriteError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # subfolder of a result that belongs to its training
# Locks and temporary files of commands that write below a target.
_TEMPORARY = re.compile(r"\.tmp\..+|\..+\.lock")

# Path below the target -> inode, size and time of its last change.
_Files = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Target:
    """A place that this process has locked.

    Attributes:
        path: The place as it was given.
        real: Its absolute path without links.
        keep: Name of a subfolder that belongs to the command and is not replaced.
        files: The files that it held when it was locked; only these are replaced.
    """

    path: Path
    real: Path
    keep: str | None = None
    files: _Files = field(default_factory=dict)

    def check_inputs(self, used: Mapping[str, str | None], *, are_places: bool = False) -> None:
        """Check that nothing that a command reads lies in the target, which will be replaced.

        Args:
            used: What it reads, by setting: places, or names that are no places.
            are_places: They are places, even those that do not exist yet.

        Raises:
            RecipeError: One of the places lies in the target, or is the target.
        """
        for setting, place in used.items():
            if not place or not (are_places or Path(place).exists()):
                continue
            real = Path(place).resolve()
            if self.real in (real, *real.parents):
                raise RecipeError(
                    f"--output {self.path} contains {setting} ({place}), which would be overwritten; choose another "
                    "folder"
                )

    def take_folder(self, written: Path) -> None:
        """Replace the target by a folder that was written next to it, and remove the old one.

        Raises:
            ConflictError: Others have changed the target since it was locked. It stays as it is, and the folder is
                kept under another name.
            OSError: It cannot be renamed.
        """
        self._check_unchanged(written)
        if self.real.exists():
            os.chmod(written, stat.S_IMODE(self.real.stat().st_mode))
            is_current = os.path.samestat(os.stat(os.curdir), self.real.stat())
            self._discard(_swap(written, self.real, self.keep))
            if is_current:
                os.chdir(self.real)
                logger.warning(f'{self.real} is a new folder of the same name: enter it again, as with cd "$PWD"')
        else:
            os.chmod(written, 0o755)
            os.rename(written, self.real)
        sync_folder(self.real.parent)

    def take_file(self, written: Path) -> None:
        """Replace the target by a file that was written next to it.

        Raises:
            ConflictError: As in `take_folder`.
            OSError: It cannot be renamed.
        """
        self._check_unchanged(written)
        os.replace(written, self.real)
        sync_folder(self.real.parent)

    def _check_unchanged(self, written: Path) -> None:
        found = _list_files(self.real, self.keep)
        if found == self.files:
            return
        changed = sorted(name for name in {*found, *self.files} if found.get(name) != self.files.get(name))
        if not found.keys() - self.files.keys() and all(name not in found for name in changed):
            return  # files were only removed
        other = _free_name(self.real)
        os.rename(written, other)
        names = ", ".join(name or self.real.name for name in changed[:3])
        raise ConflictError(
            f"{self.path} was changed while this command worked ({names}) and is left as it is; the result is "
            f"complete in {other}"
        )

    def _discard(self, old: Path) -> None:
        """Remove the old folder; files that were added in the last moment are kept in a visible place."""
        if _list_files(old, self.keep).keys() <= self.files.keys():
            if not old.name.startswith(f".{self.real.name}."):  # by which the next command knows what to remove
                place = tempfile.mkdtemp(prefix=f".{self.real.name}.", suffix=".tmp", dir=self.real.parent)
                os.rename(old, place)
                old = Path(place)
            shutil.rmtree(old, ignore_errors=True)
            return
        other = _free_name(self.real)
        os.rename(old, other)
        logger.warning(f"{self.path} was changed while it was replaced: what it held is in {other}")


@contextmanager
def open_target(
    output: str | Path,
    *,
    overwrite: bool,
    is_writer: bool = True,
    is_file: bool = False,
    keep: str | None = None,
    holds_run: bool = False,
    marks: Sequence[str] = MODEL_MARKS,
    flag: str = "--output",
) -> Iterator[Target]:
    """Check the place of a result as `check_output` does, and lock it within the context.

    Args:
        output: Place of the result.
        overwrite: Allow an existing result to be replaced.
        is_writer: This process writes the result; other ranks only check its place.
        is_file: The result is a file and not a folder.
        keep: See `Target`.
        holds_run: See `check_output`.
        marks: See `check_output`.
        flag: Command line flag to name in errors.

    Raises:
        OccupiedError: Another process writes there.
        RecipeError: The place is occupied or cannot be written.
    """
    path = Path(output)

    def check() -> None:
        check_output(path, overwrite=overwrite, is_file=is_file, holds_run=holds_run, marks=marks, flag=flag)

    check()
    if not is_writer:
        yield Target(path, path.resolve(), keep)
        return
    with locked_target(path, keep=keep, what=f"{flag} {output}") as target:
        check()  # the process that has had the lock may have written it
        yield target


@contextmanager
def locked_target(
    path: str | Path,
    *,
    keep: str | None = None,
    what: str | None = None,
    wait: float = 0.0,
) -> Iterator[Target]:
    """Lock a place within the context; what killed processes have left next to it is removed first.

    Args:
        path: The place.
        keep: See `Target`.
        what: Start of the message of an error; the default is the place.
        wait: Seconds to wait for another process that has the lock.

    Raises:
        OccupiedError: Another process has the lock.
        WriteError: The lock cannot be written.
    """
    real = Path(path).resolve()
    lock = TargetLock(real)
    try:
        lock.acquire(what or str(path), wait=wait)
    except OSError as error:
        raise WriteError(f"{real} cannot be written: {error}") from error
    try:
        _recover(real)
        yield Target(Path(path), real, keep, _list_files(real, keep))
    finally:
        lock.release()


def _recover(real: Path) -> None:
    """Remove the temporary files of killed processes; parts of the target that they had moved away return first."""
    pattern = re.compile(rf"\.{re.escape(real.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    real.with_name(f".tmp.{real.name}").unlink(missing_ok=True)  # of `replace_file`
    found = [path for path in real.parent.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink()]
    for left in sorted(found, key=lambda path: path.suffix):  # the old folder before what it has given away
        if left.suffix == ".old" and not real.exists():
            os.rename(left, real)
            continue
        if (left / CHECKPOINTS).is_dir() and real.is_dir() and not (real / CHECKPOINTS).exists():
            os.rename(left / CHECKPOINTS, real / CHECKPOINTS)
        shutil.rmtree(left, ignore_errors=True)


def _list_files(place: Path, keep: str | None) -> _Files:
    """Return the files of a folder, or of a single file by the name ""; `keep` and our temporaries are left out."""
    if not place.is_dir():
        paths = [place] if place.exists() else []
    else:
        paths = [path for path in place.rglob("*") if path.is_symlink() or not path.is_dir()]
    found = {}
    for path in paths:
        name = "" if path == place else path.relative_to(place).as_posix()
        if not _TEMPORARY.fullmatch(path.name) and (keep is None or name.partition("/")[0] != keep):
            status = path.lstat()
            found[name] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def _free_name(place: Path) -> Path:
    """Return the first of NAME-1, NAME-2, ... that does not exist."""
    names = (place.with_name(f"{place.stem}-{number}{place.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _swap(written: Path, folder: Path, keep: str | None) -> Path:
    """Rename a new folder to the name of an existing one, which gives it `keep`; return the place of the old one."""
    try:
        if keep is not None and (folder / keep).is_dir():
            os.rename(folder / keep, written / keep)
        return written if exchange(written, folder) else _swap_in_two_steps(written, folder)
    finally:  # also after a signal
        if keep is not None and (written / keep).is_dir():
            os.rename(written / keep, folder / keep)


def _swap_in_two_steps(written: Path, folder: Path) -> Path:
    aside = written.with_suffix(".old")
    os.rename(folder, aside)
    try:
        os.rename(written, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    return aside
