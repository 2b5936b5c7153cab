"""The stage `push`: upload the folder of a pruned model to the Hugging Face Hub."""

import os
from contextlib import nullcontext
from pathlib import Path

from isoprune_hf.commands.flags import PRUNED_FOLDER
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage


def run(
    *,
    folder: str,
    repo: str,
    private: bool,
    revision: str | None,
    tag: str | None,
    collection: str | None,
    create_pr: bool,
    dry_run: bool,
    check: bool,
) -> Answer:
    """Check a folder and upload it, or describe the upload."""
    from isoprune_hf.checkpoint.target import locked_target
    from isoprune_hf.commands.steps.checking import require_sound
    from isoprune_hf.hub.push import describe_push, published_files, push_folder, validate_push_options

    place = Path(folder)
    validate_push_options(repo, tag=tag, create_pr=create_pr, collection=collection)
    files = published_files(place)
    # The files belong together: nobody replaces them meanwhile. Where nobody can, there is no lock either.
    can_be_replaced = os.access(place.resolve().parent, os.W_OK)
    what = f"--folder {folder}"
    with locked_target(place, what=what) if can_be_replaced else nullcontext():
        if check:
            require_sound(place)
        if dry_run:
            text = describe_push(folder, repo, revision=revision, tag=tag, create_pr=create_pr, collection=collection)
            return Answer(text, {"repo": repo, "files": [path.name for path in files]})
        url = push_folder(
            folder, repo, private=private, revision=revision, tag=tag, create_pr=create_pr, collection=collection
        )
    return Answer(url, {"repo": repo, "url": url})


STAGE = Stage(
    name="push",
    run=run,
    text="Check a folder and upload it to the Hugging Face Hub in one commit, model card included.",
    heading=Heading.DELIVER,
    order=13,
    flags=(
        PRUNED_FOLDER,
        Flag("repo", str, None, "Repository (user/name); created if it does not exist.", required=True),
        Flag("private", bool, False, "Make the repository private."),
        Flag("revision", str | None, None, "Branch, created if it does not exist; the default is main."),
        Flag("tag", str | None, None, "Name for the commit."),
        Flag("collection", str | None, None, "Collection to add it to: the end of its address, user/title-id."),
        Flag("create_pr", bool, False, "Open a pull request instead of changing the branch."),
        Flag("dry_run", bool, False, "Only list the files and show the head of the card."),
        Flag("check", bool, True, "Refuse a folder that fails a check of `isoprune doctor`."),
    ),
    positional=("folder",),
    examples=("isoprune push finetuned --repo user/resnet50-half",),
    is_local=True,
)
