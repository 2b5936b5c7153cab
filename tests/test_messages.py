"""The wording of every error, as one file."""

from helpers.messages import SNAPSHOT, describe_messages


def test_error_texts_are_those_of_the_snapshot() -> None:
    """`python tests/helpers/messages.py` rewrites the snapshot: read the difference before committing it."""
    assert describe_messages() == SNAPSHOT.read_text(encoding="utf-8")
