"""Read the batches of a caller: `read_batches` and `read_batch` find inputs and targets in tuples, dicts, tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from isoprune_hf.data.images import holds_rows
from isoprune_hf.errors import DatasetError
from isoprune_hf.models.nested import separate

InputKeys = Sequence[int | str]
_INPUTS = ("pixel_values", "image", "images")
_TARGETS = ("labels", "label", "targets", "target")


class CallerBatch(NamedTuple):
    """One batch of a caller.

    Args:
        inputs: Its tensors that the model takes, each (B, ...).
        names: For each input, the keyword that it is given by; None for one that is given by position.
        targets: What the loss compares the outputs with; None if it has none.
        whole: The batch as the caller's data gave it.
    """

    inputs: tuple[Tensor, ...]
    names: tuple[str | None, ...]
    targets: Any
    whole: Any


def read_batches(
    data: Iterable[Any], *, samples: int, batch_size: int, keys: InputKeys | None = None
) -> list[CallerBatch]:
    """Read the first samples of some data, once; no batch is larger than `batch_size`.

    Args:
        data: Batches: tensors, tuples (inputs, targets), or dicts with one of `pixel_values`, `image` and `images`,
            and one of `labels`, `label`, `targets` and `target`. A single tensor is one batch; a data set of torch
            is loaded in its order.
        samples: Number of samples.
        batch_size: Samples of a batch.
        keys: Positions or names of the inputs in each batch; by default as above.

    Raises:
        DatasetError: There is no sample, or a batch has another form.
    """
    found: list[CallerBatch] = []
    left = samples
    for whole in _batches_of(data, batch_size):
        for part in _pieces(whole, _length(whole, keys), batch_size):
            size = _length(part, keys)
            piece = part if size <= left else _slice(part, size, slice(left))
            found.append(read_batch(piece, keys))
            left -= min(size, left)
            if not left:
                return found
    if not found:
        raise DatasetError("data: no batch; pass a loader or a list of batches, not one that has been iterated over")
    return found


def _batches_of(data: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, Dataset) or holds_rows(data):
        return DataLoader(data, batch_size)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DatasetError(f"data: got {type(data).__name__}; pass a loader or a list of batches")
    batches: Iterable[Any] = data
    return batches


def _pieces(whole: Any, size: int, batch_size: int) -> Iterator[Any]:
    """Yield the parts of a batch that are no larger than `batch_size`."""
    if size <= batch_size:
        yield whole
        return
    for start in range(0, size, batch_size):
        yield _slice(whole, size, slice(start, start + batch_size))


def _slice(whole: Any, size: int, part: slice) -> Any:
    """Return some samples of a batch: the slices of its tensors of length `size`."""
    tensors, form = separate(whole)
    return form.fill([tensor[part] if tensor.ndim and len(tensor) == size else tensor for tensor in tensors])


def _length(whole: Any, keys: InputKeys | None) -> int:
    return len(read_batch(whole, keys).inputs[0])


def read_batch(whole: Any, keys: InputKeys | None = None) -> CallerBatch:
    """Find inputs and targets in a batch.

    Raises:
        DatasetError: It has another form.
    """
    if isinstance(whole, Tensor):
        return CallerBatch(_checked((whole,), ("the batch",)), (None,), None, whole)
    if isinstance(whole, Mapping):
        names = keys or [name for name in _INPUTS if name in whole][:1]
        if not names or any(name not in whole for name in names):
            raise DatasetError(
                f"data: a batch has the entries {', '.join(map(str, whole))}; name those that the model takes with "
                "inputs=[...]"
            )
        targets = next((whole[name] for name in _TARGETS if name in whole and name not in names), None)
        keywords = tuple(map(str, keys)) if keys else (None,)
        return CallerBatch(_checked([whole[name] for name in names], names), keywords, targets, whole)
    if isinstance(whole, Sequence) and not isinstance(whole, str):
        return _read_tuple(whole, keys)
    raise DatasetError(f"data: a batch must be a tensor, a tuple or a dict, got {type(whole).__name__}")


def _read_tuple(whole: Sequence[Any], keys: InputKeys | None) -> CallerBatch:
    places = keys or [0]
    if not whole or any(type(place) is not int or not 0 <= place < len(whole) for place in places):
        raise DatasetError(f"data: a batch is a tuple of {len(whole)}, which has no inputs {list(places)}")
    others = [entry for place, entry in enumerate(whole) if place not in places]
    if keys is None and len(others) > 1:
        raise DatasetError(
            f"data: a batch is a tuple of {len(whole)}, not of inputs and targets; name the positions of those that "
            "the model takes with inputs=[0, ...]"
        )
    targets = others[0] if len(others) == 1 else None
    inputs = _checked([whole[place] for place in places if isinstance(place, int)], places)
    return CallerBatch(inputs, (None,) * len(inputs), targets, whole)


def _checked(inputs: Sequence[Any], names: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return inputs that are floating-point tensors with equally many samples.

    Raises:
        DatasetError: They are not.
    """
    for name, value in zip(names, inputs, strict=True):
        if not isinstance(value, Tensor):
            raise DatasetError(f"data: the input {name} of a batch must be a tensor, got {type(value).__name__}")
        if value.ndim < 2 or not len(value):
            raise DatasetError(
                f"data: the input {name} of a batch must have the shape (B, ...), got {list(value.shape)}"
            )
        if not value.is_floating_point():
            raise DatasetError(
                f"data: the input {name} of a batch is of type {value.dtype}; inputs must be floating-point numbers, "
                "as an image processor or a transform makes them"
            )
        if len(value) != len(inputs[0]):
            raise DatasetError(
                f"data: the input {name} of a batch has {len(value)} samples, and {names[0]} has {len(inputs[0])}"
            )
    return tuple(inputs)
