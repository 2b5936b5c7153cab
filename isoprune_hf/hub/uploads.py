"""Upload what a stage writes: its result, and during training the newest checkpoint.

`open_uploads` checks the request and opens the repository; `Uploads` sends checkpoints in a thread, and the result.
"""

import logging
import shutil
import tempfile
import threading
from pathlib import Path

from accelerate import Accelerator

from isoprune_hf.checkpoint.folder import link_files
from isoprune_hf.errors import HubError, IsoPruneError, RecipeError
from isoprune_hf.hub.push import open_repository, push_folder, validate_push_options

logger = logging.getLogger(__name__)

CHECKPOINT_BRANCH = "training"  # the main branch receives only the result


def open_uploads(repo: str | None, accelerator: Accelerator, every: int | None = None) -> "Uploads | None":
    """Open the uploads that a stage was asked for.

    Args:
        repo: `user/name`, or None for no uploads.
        accelerator: Only its main process uploads.
        every: Number of epochs between two uploaded checkpoints; without it no checkpoint is uploaded.

    Returns:
        The uploads on the main process; None on other processes and without `repo`.

    Raises:
        RecipeError: `every` is below 1 or given without `repo`.
        HubError: See `Uploads`.
    """
    if every is not None and (repo is None or every < 1):
        raise RecipeError(f"push_every must be at least 1 and needs push_to_hub, got {every} and {repo}")
    return Uploads(repo, every) if repo is not None and accelerator.is_main_process else None


class Uploads:
    """Sends the files of a stage to one repository.

    The repository is opened at construction, so a missing login is reported before any work.

    Args:
        repo: `user/name`; it is created, public, if it does not exist.
        every: Number of epochs between two checkpoints that are sent to the branch `training`; None sends none.

    Raises:
        RecipeError: `repo` is not a valid repository name.
        HubError: No login, no permission, or no network.
    """

    def __init__(self, repo: str, every: int | None = None):
        validate_push_options(repo)
        open_repository(repo)
        self._repo = repo
        self._every = every
        self._thread: threading.Thread | None = None

    def offer(self, checkpoint: Path, epoch: int) -> None:
        """Send a checkpoint in a thread if its epoch is due and no upload is in progress.

        Training does not wait, and a failed upload is logged as a warning. The caller may replace the checkpoint
        during the upload.

        Args:
            checkpoint: Folder of the checkpoint.
            epoch: Number of finished epochs.
        """
        if self._every is None or epoch % self._every:
            return
        if self._thread is not None and self._thread.is_alive():
            logger.warning(
                f"an earlier checkpoint is still being uploaded to {self._repo}: epoch {epoch} is not uploaded"
            )
            return
        try:
            copied = _link_files(checkpoint)
        except OSError as error:
            logger.warning(
                f"the checkpoint of epoch {epoch} cannot be copied for its upload ({error.strerror or error})"
            )
            return
        # A daemon thread: a run that ends does not wait for the network, and a commit is complete or not made at all.
        self._thread = threading.Thread(target=self._send, args=(copied, epoch), daemon=True)
        self._thread.start()

    def finish(self, folder: Path) -> str:
        """Send the result to the main branch, after the upload in progress.

        Returns:
            URL of the commit.

        Raises:
            HubError: As in `push_folder`; the folder is complete, and `isoprune push` can send it.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            return push_folder(folder, self._repo)
        except HubError as error:
            advice = f"push it with `isoprune push {folder} --repo {self._repo}`"
            raise HubError(f"{error}; the result is complete in {folder}: {advice}") from error

    def _send(self, copied: Path, epoch: int) -> None:
        message = f"Upload the checkpoint of epoch {epoch}"
        try:
            push_folder(copied, self._repo, revision=CHECKPOINT_BRANCH, message=message)
            logger.info(f"uploaded the checkpoint of epoch {epoch} to the branch {CHECKPOINT_BRANCH} of {self._repo}")
        except IsoPruneError as error:
            logger.warning(f"the checkpoint of epoch {epoch} was not uploaded: {error}; training continues")
        finally:
            shutil.rmtree(copied, ignore_errors=True)


def _link_files(checkpoint: Path) -> Path:
    """Link the files of a folder into a temporary folder next to it."""
    linked = Path(tempfile.mkdtemp(prefix=".push.", suffix=".tmp", dir=checkpoint.parent))
    try:
        link_files(checkpoint, linked)
    except OSError:
        shutil.rmtree(linked, ignore_errors=True)
        raise
    return linked
