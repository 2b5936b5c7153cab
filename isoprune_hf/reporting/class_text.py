"""Describe an isomorphic class for readers who do not know its signature: call `describe_class`."""

import re
from collections import Counter
from collections.abc import Sequence

from isoprune_hf.pruning.groups import CoupledGroup

_ENTRY = re.compile(r"(\w+)\.(out|in)\b")
_NORMALISATION = re.compile(r".*Norm\d?d?")  # passes channels on, without mixing them


def describe_class(groups: Sequence[CoupledGroup]) -> str:
    """Return in words what the groups of a class are, such as `4 hidden layers, Linear to Linear`.

    Args:
        groups: Groups of one class, which have the same signature.
    """
    first, count = groups[0], len(groups)
    if first.num_heads:
        heads = f" of {first.num_heads} heads" if first.num_heads > 1 else ""
        return f"{_count(count, 'attention')}{heads}"
    writers, readers = _layers(first.signature, "out"), _layers(first.signature, "in")
    number = writers.total()
    if number == 1 and readers.total() == 1:
        return f"{_count(count, 'hidden layer')}, {next(iter(writers))} to {next(iter(readers))}"
    written, read = _count(number, "layer"), _count(readers.total(), "layer")
    return f"{_count(count, 'stream')}, written by {written} and read by {read}"


def _layers(signature: str, side: str) -> Counter[str]:
    """Return the layers of a signature with the channels on one side, without normalisation, by type."""
    found = _ENTRY.findall(signature)
    return Counter(kind for kind, place in found if place == side and not _NORMALISATION.fullmatch(kind))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
