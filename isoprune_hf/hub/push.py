"""Push the folder of a model to the Hub in one commit that contains the files of the model and nothing else.

`push_folder` uploads, `describe_push` shows what would be uploaded, `validate_push_options` checks the options only.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported without a declaration

from isoprune_hf.checkpoint.modeling_isoprune import code_that_ships
from isoprune_hf.checkpoint.pretrained import AUTO_CLASSES
from isoprune_hf.checkpoint.stock import isoprune_fields
from isoprune_hf.errors import CheckpointError, HubError, RecipeError
from isoprune_hf.hub.base_license import find_base_license
from isoprune_hf.hub.publication import CARD, prepare_files
from isoprune_hf.hub.requests import retry, translate_errors
from isoprune_hf.plain_files import read_json, read_text

_PROCESSOR = "preprocessor_config.json"
_REQUIRED_FILES = ("config.json", "model.safetensors")
_CODE = "modeling_isoprune.py"
_OTHER_FILES = (CARD, "LICENSE", "pruning_plan.json", "metrics.json", "speed.json")
_PUSHED_FILES = {*_REQUIRED_FILES, _PROCESSOR, _CODE, *_OTHER_FILES}
_PUSHED_SUFFIX = ".png"  # the pictures of the card
_SHOWN_CARD_LINES = 12  # after the metadata


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
    needs_processor: bool = True,
) -> str:
    """Upload the folder of a pruned model in one commit.

    What is sent holds no path of this machine, and a card that nobody edited is built again for the repository; the
    folder stays as it is.

    The login is that of `hf auth login` or HF_TOKEN. Only files that this package writes, a LICENSE and pictures are
    uploaded, and no code but that of the installed package. Files that are already on the Hub are not sent again, so
    an interrupted push can simply be repeated.

    Args:
        folder: Folder that `save_pretrained` wrote.
        repo: `user/name`; it is created if it does not exist.
        private: Make the repository private if it is created.
        revision: Branch; it is created if it does not exist. The default is `main`.
        tag: Name for the commit, created after it.
        create_pr: Open a pull request instead of changing the branch.
        collection: Slug of a collection, `user/title-id`, that the model is added to after the commit.
        message: Title of the commit.
        needs_processor: Refuse a folder without an image processor, which `pipeline` does not open.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        CheckpointError: The folder is not that of a pruned model, its code is not that of the installed package, or
            one of its files is a link.
        RecipeError: `repo` is not a valid repository name, or the options contradict each other.
        HubError: No login, no permission, or no network.

    Note:
        Temporary failures (429, 5xx, a lost connection) are retried five times, after the seconds of Retry-After or
        after 1, 2, 4, 8 and 16 s.
    """
    folder = Path(folder)
    validate_push_options(repo, tag=tag, create_pr=create_pr, collection=collection)
    files = published_files(folder, needs_processor=needs_processor)
    base_license = find_base_license(_read_config(folder))
    prepared = prepare_files(folder, repo, files, base_license=base_license)
    with translate_errors(repo, folder.name, create_pr=create_pr):
        api = open_repository(repo, private=private)
        if revision is not None:
            retry(lambda: api.create_branch(repo, branch=revision, exist_ok=True))

        def commit_files() -> CommitInfo:
            # Not upload_folder: with Xet it may split a folder into several commits. Each attempt needs new
            # operations, because they store the state of the Hub at the previous attempt.
            added = [CommitOperationAdd(file.name, file.content) for file in prepared]
            return api.create_commit(repo, added, commit_message=message, revision=revision, create_pr=create_pr)

        # A repeated request would open a second pull request.
        commit = retry(commit_files, only_if_rejected=create_pr)
        if tag is not None:
            retry(lambda: _set_tag(api, repo, tag, commit.oid))
        if collection is not None:
            retry(lambda: _add_to_collection(api, repo, collection))
        return commit.pr_url or commit.commit_url


def open_repository(repo: str, *, private: bool = False) -> HfApi:
    """Create a repository if it does not exist, and check that this login may write to it.

    Args:
        repo: `user/name`.
        private: Make it private if it is created.

    Raises:
        HubError: No login, no permission, or no network.
    """
    with translate_errors(repo, repo):
        # With token=True a missing login is an error before the first request.
        api = HfApi(token=True)
        retry(lambda: api.create_repo(repo, private=private, exist_ok=True))
        return api


def describe_push(
    folder: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    collection: str | None = None,
) -> str:
    """Return the files that a push would send and the head of the model card; nothing is sent or written.

    Args:
        folder: As in `push_folder`.
        repo: As in `push_folder`.
        revision: As in `push_folder`.
        tag: As in `push_folder`.
        create_pr: As in `push_folder`.
        collection: As in `push_folder`.

    Raises:
        CheckpointError: See `push_folder`.
        RecipeError: See `push_folder`.
    """
    folder = Path(folder)
    validate_push_options(repo, tag=tag, create_pr=create_pr, collection=collection)
    files = published_files(folder)
    base_license = find_base_license(_read_config(folder), local_only=True)
    prepared = prepare_files(folder, repo, files, base_license=base_license)
    card = next(file.content for file in prepared if file.name == CARD)
    text = read_text(card) if isinstance(card, Path) else card.decode()
    sizes = {file.name: file.size for file in prepared}
    target = "a pull request" if create_pr else f"branch {revision or 'main'}"
    extras = "".join(f", {name} {value}" for name, value in (("tag", tag), ("collection", collection)) if value)
    metadata, _, body = text.removeprefix("---\n").partition("\n---\n")
    lines = [f"{repo}: {len(sizes)} files in one commit to {target}{extras}; nothing was sent"]
    lines += [f"  {size:>13,}  {name}" for name, size in sorted(sizes.items())]
    others = sorted(path.name for path in folder.iterdir() if path.name not in sizes)
    if isinstance(card, Path):
        lines += [f"{CARD} was edited, or is of an earlier version, and is sent as it is"]
    if others:
        lines += [f"not sent, since they are not files of a model: {', '.join(others)}"]
    return "\n".join([*lines, "", "---", metadata, "---", *body.strip().splitlines()[:_SHOWN_CARD_LINES]])


def published_files(folder: Path, *, needs_processor: bool = True) -> list[Path]:
    """Return the files of a folder that a push sends.

    Args:
        folder: The folder.
        needs_processor: See `push_folder`.

    Raises:
        CheckpointError: The folder is not that of a pruned model, its code is not that of the installed package, or
            one of its files is a link.
    """
    for name in (*_REQUIRED_FILES, *([_PROCESSOR] if needs_processor else [])):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; push the folder of a pruned model")
    _read_config(folder)
    _check_code(folder, read_json(folder / "config.json"))
    files = sorted(path for path in folder.iterdir() if _is_published(path))
    for path in files:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}; replace it by the file, then push the folder"
            )
    return files


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the IsoPruneConfig fields of a folder.

    Raises:
        CheckpointError: It is not the folder of a pruned model.
    """
    try:
        values = read_json(folder / "config.json")
    except ValueError as error:
        raise CheckpointError(f"{folder}: config.json is not valid JSON ({error})") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    config = None if model_type is None else isoprune_fields(values)
    if config is None:
        raise CheckpointError(f"{folder}: config.json has model_type {model_type!r}, a pruned model has 'isoprune'")
    return config


def validate_push_options(
    repo: str, *, tag: str | None = None, create_pr: bool = False, collection: str | None = None
) -> None:
    """Check the options of a push, without the folder and without network.

    Raises:
        RecipeError: `repo` is not a valid repository name, or the options contradict each other.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"repo must look like user/name, got {repo!r}") from error
    if repo.count("/") != 1:
        raise RecipeError(f"repo must look like user/name, got {repo!r}")
    if tag is not None and create_pr:
        raise RecipeError(
            f"tag {tag} cannot be combined with create_pr: a pull request has no commit to tag; tag it after merging"
        )
    if collection is not None and not re.fullmatch(r"[\w.-]+/[\w-]+", collection):
        raise RecipeError(f"collection must be the end of its address, user/title-id, got {collection!r}")


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    """Check that the config points to no code but that of the installed package.

    Raises:
        CheckpointError: `auto_map` names other code, or `modeling_isoprune.py` was changed or is of another version.
    """
    ours = {auto: f"{Path(_CODE).stem}.{name}" for auto, name in AUTO_CLASSES.items()}
    for name in filter(lambda name: (folder / name).is_file(), ("config.json", _PROCESSOR)):
        values = config if name == "config.json" else read_json(folder / name)
        named = values.get("auto_map", {}) if isinstance(values, dict) else {}
        if not isinstance(named, dict) or any(named[auto] != ours.get(auto) for auto in named):
            raise CheckpointError(f"{folder}: auto_map of {name} points to other code than {_CODE}: {named!r:.99}")
    code = folder / _CODE
    if code.is_file() and code.read_bytes() != code_that_ships().encode():
        raise CheckpointError(
            f"{folder} is not pushed: modeling_isoprune.py is not the code of this isoprune_hf; open and save the "
            "model with this version"
        )


def _is_published(path: Path) -> bool:
    is_temporary = path.name.startswith(".") or ".tmp" in path.name
    is_named = path.name in _PUSHED_FILES or path.suffix == _PUSHED_SUFFIX
    return path.is_file() and is_named and not is_temporary


def _set_tag(api: HfApi, repo: str, tag: str, commit: str) -> None:
    """Tag a commit; a tag that an earlier push has set on the same commit is accepted."""
    try:
        api.create_tag(repo, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        tagged = {ref.target_commit for ref in api.list_repo_refs(repo).tags if ref.name == tag}
        if commit not in tagged:
            raise HubError(
                f"the files were uploaded to {repo}, but its tag {tag} names another commit; choose another tag"
            ) from error


def _add_to_collection(api: HfApi, repo: str, collection: str) -> None:
    try:
        api.add_collection_item(collection, repo, "model", exists_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        raise HubError(
            f"the files were uploaded to {repo}, but the Hub has no collection {collection} that this login may "
            "change; check the end of its address"
        ) from error
