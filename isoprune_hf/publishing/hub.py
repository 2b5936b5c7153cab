"""The way of a folder to the Hub: one commit with the files of the model and nothing else."""

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from isoprune_hf.checkpoint.stock import our_values
from isoprune_hf.errors import CheckpointError, HubError, RecipeError
from isoprune_hf.publishing.model_card import build_model_card

_REQUIRED = ("config.json", "model.safetensors", "preprocessor_config.json")
_KINDS = (".json", ".safetensors", ".md", ".py", ".png")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_ANSWERS = {
    401: f"the Hub does not know this login: {_LOGIN}",
    403: "the Hub forbids this login to write to {repo}: " + _LOGIN,
    404: "the Hub has no {repo} that this login may see: check the name, or " + _LOGIN,
    429: "the Hub has had too many requests from this login: push again later",
}


def push_folder(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload the folder of a pruned model in one commit; write its model card first if it has none.

    The login is the one of `hf auth login` or HF_TOKEN. Files of other kinds and all subfolders stay where they are.

    Args:
        folder: Folder that `save_pretrained` wrote.
        repo: `user/name`; it is created if it does not exist.
        private: A repository that is created here is private.

    Returns:
        URL of the commit.

    Raises:
        CheckpointError: The folder is not one of a pruned model.
        RecipeError: `repo` is no name of a repository.
        HubError: No login, no permission, or no network.
    """
    folder = Path(folder)
    _check_folder(folder)
    _check_repo(repo)
    if not (folder / "README.md").exists():
        temporary = folder / ".README.md.tmp"
        build_model_card(folder, repo=repo).save(temporary)
        temporary.replace(folder / "README.md")
    files = sorted(path for path in folder.iterdir() if _is_published(path))
    try:
        # With token=True a missing login is an error before the first request.
        api = HfApi(token=True)
        api.create_repo(repo, private=private, exist_ok=True)
        # Not upload_folder: with Xet it may split a folder into several commits.
        operations = [CommitOperationAdd(path.name, path) for path in files]
        return api.create_commit(repo, operations, commit_message="Upload pruned model").commit_url
    except LocalTokenNotFoundError as error:
        raise HubError(f"no login for the Hub: {_LOGIN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        answer = _ANSWERS.get(status, "the Hub answered with status {status}: push again later")
        raise HubError(answer.format(repo=repo, status=status)) from error
    except UnicodeEncodeError:
        raise HubError(f"the login holds a character that no token has: {_LOGIN}") from None
    except ValueError as error:
        raise HubError(f"the Hub cannot take {folder.name}: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError) as error:
        # A protocol error may quote the header with the token, so neither its text nor the error itself is handed on.
        raise HubError(
            f"the Hub cannot be reached ({type(error).__name__}): check the network, then push again"
        ) from None


def _check_folder(folder: Path) -> None:
    for name in _REQUIRED:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; push the folder of a pruned model")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder}: config.json is no JSON ({error})") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind is None or our_values(config) is None:
        raise CheckpointError(f"{folder}: config.json has model_type {kind!r}, a pruned model has 'isoprune'")


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"repo must look like user/name, got {repo!r}") from error
    if repo.count("/") != 1:
        raise RecipeError(f"repo must look like user/name, got {repo!r}")


def _is_published(path: Path) -> bool:
    return path.is_file() and path.suffix in _KINDS and not path.name.startswith(".") and ".tmp" not in path.name
