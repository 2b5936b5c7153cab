"""Uploads of a stage that writes a folder: its result, and on the way the newest checkpoint beside the training."""

import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

from accelerate import Accelerator

from isoprune_hf.errors import HubError, IsoPruneError, RecipeError
from isoprune_hf.hub.push import check_wishes, open_repository, push_folder

logger = logging.getLogger(__name__)

BRANCH = "training"  # of checkpoints: who opens the model gets the main branch


class Uploads:
    """Sends what a stage writes to one repository, which is opened at once: a missing login shows before the work.

    Args:
        repo: `user/name`; it is created, public, if it does not exist.
        every: Epochs between two checkpoints that are sent to the branch `training`; none without it.

    Raises:
        RecipeError: `repo` is no name of a repository.
        HubError: No login, no permission, or no network.
    """

    def __init__(self, repo: str, every: int | None = None):
        check_wishes(repo)
        open_repository(repo)
        self._repo, self._every = repo, every
        self._thread: threading.Thread | None = None

    def offer(self, checkpoint: Path, epoch: int) -> None:
        """Send a checkpoint from a thread of its own, where it is due and the one before it has arrived.

        Training waits for nothing, and a failed upload is a warning. The checkpoint may be replaced meanwhile.
        """
        if self._every is None or epoch % self._every:
            return
        if self._thread is not None and self._thread.is_alive():
            logger.warning(f"the upload of an earlier checkpoint to {self._repo} goes on: epoch {epoch} is not sent")
            return
        try:
            held = _hold(checkpoint)
        except OSError as error:
            logger.warning(f"the checkpoint of epoch {epoch} cannot be held for its upload ({error.strerror})")
            return
        # A daemon: a run that is ended does not wait for the network, and a commit is made whole or not at all.
        self._thread = threading.Thread(target=self._send, args=(held, epoch), daemon=True)
        self._thread.start()

    def _send(self, held: Path, epoch: int) -> None:
        try:
            push_folder(held, self._repo, revision=BRANCH, message=f"Upload the checkpoint of epoch {epoch}")
            logger.info(f"the checkpoint of epoch {epoch} is on the branch {BRANCH} of {self._repo}")
        except IsoPruneError as error:
            logger.warning(f"the checkpoint of epoch {epoch} was not sent: {error}; training goes on")
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def finish(self, folder: Path) -> str:
        """Send the result to the main branch; returns the URL of the commit.

        Raises:
            HubError: As in `push_folder`; the folder is whole, and `isoprune push` sends it.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            return push_folder(folder, self._repo)
        except HubError as error:
            advice = f"send it with `isoprune push {folder} --repo {self._repo}`"
            raise HubError(f"{error}; the result is in {folder}: {advice}") from error


def _hold(checkpoint: Path) -> Path:
    """Give its files second names beside it, or copy them where the file system has no such names."""
    held = Path(tempfile.mkdtemp(prefix=".push.", suffix=".tmp", dir=checkpoint.parent))
    try:
        for path in checkpoint.iterdir():
            if path.is_file():
                try:
                    os.link(path, held / path.name)
                except OSError:
                    shutil.copyfile(path, held / path.name)
    except OSError:
        shutil.rmtree(held, ignore_errors=True)
        raise
    return held


def open_uploads(repo: str | None, accelerator: Accelerator, every: int | None = None) -> Uploads | None:
    """Open the uploads that a stage was asked for, on the main process.

    Raises:
        RecipeError: What was asked for does not fit together.
        HubError: See `Uploads`.
    """
    if every is not None and (repo is None or every < 1):
        raise RecipeError(f"push_every must be at least 1 and needs push_to_hub, got {every} and {repo}")
    return Uploads(repo, every) if repo is not None and accelerator.is_main_process else None
