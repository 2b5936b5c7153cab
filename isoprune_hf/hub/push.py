"""The way of a folder to the Hub: one commit with the files of the model and nothing else."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from isoprune_hf.checkpoint.stock import isoprune_fields
from isoprune_hf.errors import CheckpointError, HubError, RecipeError
from isoprune_hf.reporting.model_card import build_model_card

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
_REQUIRED = ("config.json", "model.safetensors", "preprocessor_config.json")
_KINDS = (".json", ".safetensors", ".md", ".py", ".png")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_ANSWERS = {
    401: f"the Hub does not know this login: {_LOGIN}",
    403: "the Hub forbids this login to write to {repo}: " + _LOGIN,
    404: "the Hub has no {repo} that this login may see: check the name, or " + _LOGIN,
    409: "the Hub has another change of {repo} under way: look at it, then push again",
    412: "the Hub has another change of {repo} under way: look at it, then push again",
    429: "the Hub has had too many requests from this login: push again later",
}
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt
_LONGEST_WAIT = 300.0
_HEAD_OF_CARD = 12  # lines of text after the metadata


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    collection: str | None = None,
    message: str = "Upload pruned model",
) -> str:
    """Upload the folder of a pruned model in one commit; write its model card first if it has none.

    The login is the one of `hf auth login` or HF_TOKEN. Files of other kinds and all subfolders stay where they are.
    Files that the Hub has already are not sent again, so that a push that was interrupted is simply repeated.

    Args:
        folder: Folder that `save_pretrained` wrote.
        repo: `user/name`; it is created if it does not exist.
        private: A repository that is created here is private.
        revision: Branch; it is made if it does not exist. The default is `main`.
        tag: Name for the commit, made when it is there.
        create_pr: Open a pull request instead of changing the branch.
        collection: Slug of a collection, `user/title-id`, that the model is added to when it is there.
        message: Title of the commit.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        CheckpointError: The folder is not one of a pruned model, or a file of it is a link.
        RecipeError: `repo` is no name of a repository, or the options contradict one another.
        HubError: No login, no permission, or no network.

    Note:
        What fails for the moment (429, 5xx, a lost connection) is tried again five times, after the seconds of
        Retry-After or after 1, 2, 4, 8 and 16 s.
    """
    folder = Path(folder)
    check_wishes(repo, tag, create_pr, collection)
    files = published_files(folder)
    if folder / "README.md" not in files:
        temporary = folder / ".README.md.tmp"
        build_model_card(folder, repo=repo).save(temporary)
        temporary.replace(folder / "README.md")
        files = published_files(folder)
    with _in_one_line(repo, folder.name, create_pr):
        api = open_repository(repo, private=private)
        if revision is not None:
            _try_again(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        commit = _try_again(
            lambda: api.create_commit(
                repo,
                # Not upload_folder: with Xet it may split a folder into several commits. New objects for each attempt,
                # since they remember what the Hub had at the last one.
                [CommitOperationAdd(path.name, path) for path in files],
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
            ),
            # A pull request whose answer was lost would be opened twice.
            only_refused=create_pr,
        )
        if tag is not None:
            _try_again(lambda: _set_tag(api, repo, tag, commit.oid))
        if collection is not None:
            _try_again(lambda: _add_to_collection(api, repo, collection))
        return commit.pr_url or commit.commit_url


def open_repository(repo: str, *, private: bool = False) -> HfApi:
    """Make sure that a repository is there and that this login may write to it.

    Args:
        repo: `user/name`.
        private: It is private if it is created here.

    Raises:
        HubError: No login, no permission, or no network.
    """
    with _in_one_line(repo, repo):
        # With token=True a missing login is an error before the first request.
        api = HfApi(token=True)
        _try_again(lambda: api.create_repo(repo, private=private, exist_ok=True))
        return api


@contextmanager
def _in_one_line(repo: str, what: str, create_pr: bool = False) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"no login for the Hub: {_LOGIN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        answer = _ANSWERS.get(status, "the Hub answered with status {status}: push again later")
        raise HubError(answer.format(repo=repo, status=status)) from error
    except UnicodeEncodeError:
        raise HubError(f"the login holds a character that no token has: {_LOGIN}") from None
    except ValueError as error:
        raise HubError(f"the Hub cannot take {what}: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError) as error:
        # A protocol error may quote the header with the token, so neither its text nor the error itself is handed on.
        advice = "look for a pull request, then push again" if create_pr else "check the network, then push again"
        raise HubError(f"the Hub cannot be reached ({type(error).__name__}): {advice}") from None


def describe_push(
    folder: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    collection: str | None = None,
) -> str:
    """Say what a push would send, and show the head of the card; sends and writes nothing.

    Raises:
        CheckpointError: See `push_folder`.
        RecipeError: See `push_folder`.
    """
    folder = Path(folder)
    check_wishes(repo, tag, create_pr, collection)
    files = published_files(folder)
    card = folder / "README.md"
    text = card.read_text() if card in files else str(build_model_card(folder, repo=repo))
    sizes = {path.name: path.stat().st_size for path in files} | {"README.md": len(text.encode())}
    goal = "a pull request" if create_pr else f"branch {revision or 'main'}"
    metadata, _, body = text.removeprefix("---\n").partition("\n---\n")
    extras = "".join(f", {name} {value}" for name, value in (("tag", tag), ("collection", collection)) if value)
    lines = [f"{repo}: {len(sizes)} files in one commit to {goal}{extras}; nothing was sent"]
    lines += [f"  {size:>13,}  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, "", "---", metadata, "---", *body.strip().splitlines()[:_HEAD_OF_CARD]])


def published_files(folder: Path) -> list[Path]:
    """List the files of a folder that a push sends.

    Raises:
        CheckpointError: The folder is not one of a pruned model, or a file of it is a link.
    """
    for name in _REQUIRED:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; push the folder of a pruned model")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder}: config.json is no JSON ({error})") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind is None or isoprune_fields(config) is None:
        raise CheckpointError(f"{folder}: config.json has model_type {kind!r}, a pruned model has 'isoprune'")
    files = sorted(path for path in folder.iterdir() if _is_published(path))
    for path in files:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {path.readlink()}; push a folder that holds its own files")
    return files


def _is_published(path: Path) -> bool:
    return path.is_file() and path.suffix in _KINDS and not path.name.startswith(".") and ".tmp" not in path.name


def check_wishes(repo: str, tag: str | None = None, create_pr: bool = False, collection: str | None = None) -> None:
    """Check what needs no folder and no network.

    Raises:
        RecipeError: `repo` is no name of a repository, or the options contradict one another.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"repo must look like user/name, got {repo!r}") from error
    if repo.count("/") != 1:
        raise RecipeError(f"repo must look like user/name, got {repo!r}")
    if tag is not None and create_pr:
        raise RecipeError(f"tag {tag}: a pull request has no commit to name yet; tag it when it is merged")
    if collection is not None and not re.fullmatch(r"[\w.-]+/[\w-]+", collection):
        raise RecipeError(f"collection must be the end of its address, user/title-id, got {collection!r}")


def _try_again(action: Callable[[], Answer], *, only_refused: bool = False) -> Answer:
    """Do what may fail for the moment, up to six times.

    Args:
        action: What is done.
        only_refused: Not where it may have been done although no answer came.
    """
    for wait in _WAITS:
        try:
            return action()
        except HfHubHTTPError as error:
            status, advised = error.response.status_code, error.response.headers.get("Retry-After", "")
            if not (status in (429, 503) if only_refused else status == 429 or 500 <= status < 600):
                raise
            seconds = min(float(advised) if advised.isdecimal() else wait, _LONGEST_WAIT)
            logger.warning(f"the Hub answered with status {status}: trying again in {seconds:.0f} s")
        except HTTPError as error:
            if only_refused:
                raise
            seconds = wait
            logger.warning(f"the Hub cannot be reached ({type(error).__name__}): trying again in {seconds:.0f} s")
        time.sleep(seconds)
    return action()


def _set_tag(api: HfApi, repo: str, tag: str, commit: str) -> None:
    try:
        api.create_tag(repo, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        named = {ref.target_commit for ref in api.list_repo_refs(repo).tags if ref.name == tag}
        if commit not in named:  # else it is there from a push before
            text = f"the tag {tag} of {repo} names another commit: the files have arrived, choose another tag"
            raise HubError(text) from error


def _add_to_collection(api: HfApi, repo: str, collection: str) -> None:
    try:
        api.add_collection_item(collection, repo, "model", exists_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        text = f"the Hub has no collection {collection} that this login may change: the files have arrived, "
        raise HubError(f"{text}check the end of its address") from error
