"""Notes that a trace attaches to the tensors of a forward pass, as attributes of the tensor objects.

For each input of an operation, the tracer needs the axes that it found before. A dict by identity would have to keep
every activation alive, because the identity of a freed tensor is reused; an attribute disappears with its tensor. A
network may cache a tensor from one pass to the next, so each note names the trace that wrote it, and other traces
ignore it.
"""

from typing import NamedTuple

from torch import Tensor

from isoprune_hf.pruning.graph.axis import Axis

_NOTE = "_isoprune_note"
_LIVE = "_isoprune_is_live"


class Source(NamedTuple):
    """The origin of the values of a tensor.

    Args:
        ops: Numbers of the traced operations that computed it; the image is operation -1.
        tensors: Names of the parameters and buffers that it is a view of or was computed from by layout operations.
    """

    ops: frozenset[int] = frozenset()
    tensors: frozenset[str] = frozenset()


class Note(NamedTuple):
    """The axes and the source of a tensor, and the trace that they belong to."""

    owner: object
    axes: tuple[Axis, ...]
    source: Source


_NO_NOTE = Note(None, (), Source())


def attach_note(tensor: Tensor, note: Note) -> None:
    """Attach a note to a tensor in place; replaces an earlier one."""
    setattr(tensor, _NOTE, note)


def read_note(tensor: Tensor) -> Note:
    """Return the note of a tensor, or an empty one without an owner."""
    note: Note = getattr(tensor, _NOTE, _NO_NOTE)
    return note


def mark_live(tensor: Tensor) -> None:
    """Mark a tensor, in place, as computed from the image or from a tensor of the network."""
    setattr(tensor, _LIVE, True)


def is_live(tensor: Tensor) -> bool:
    """Check whether `mark_live` marked a tensor."""
    return getattr(tensor, _LIVE, False)
