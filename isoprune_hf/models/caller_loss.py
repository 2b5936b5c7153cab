"""A loss that the caller wrote, as an objective: `CallerLoss`, and `pack_targets` for what it reads of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.errors import DatasetError
from isoprune_hf.models.calling import CallForm
from isoprune_hf.models.nested import Form, separate
from isoprune_hf.models.objective import side_by_side, squared_distances


@dataclass(frozen=True, eq=False)
class BatchForm:
    """The form of the caller's batches, by which one is made again from inputs and packed targets.

    Args:
        form: The batch without its tensors.
        roles: For each tensor of the batch: number of the input that it is, -1 for a target, None if it is neither
            and cannot be given to a loss of single samples.
        shapes: Of each target, without the dim of the batch.
        dtypes: Of each target.
    """

    form: Form
    roles: tuple[int | None, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, whole: Any, inputs: Sequence[Tensor]) -> "BatchForm":
        """Return the form of a batch with these inputs."""
        tensors, form = separate(whole)
        places = {id(value): place for place, value in enumerate(inputs)}
        samples = len(inputs[0])
        roles = [places.get(id(value), -1 if value.ndim and len(value) == samples else None) for value in tensors]
        targets = [value for value, role in zip(tensors, roles, strict=True) if role == -1]
        shapes = tuple(value.shape[1:] for value in targets)
        dtypes = tuple(value.dtype for value in targets)
        return cls(form, tuple(roles), shapes, dtypes)

    def pack(self, whole: Any) -> Tensor:
        """Return the targets of a batch side by side, (B, N), in a type that holds all of their values.

        Raises:
            DatasetError: The batch has another form.
        """
        tensors, form = separate(whole)
        if form.spec != self.form.spec or len(tensors) != len(self.roles):
            raise DatasetError(f"data: a batch has the form {form.spec}, the first one {self.form.spec}")
        targets = [value.detach() for value, role in zip(tensors, self.roles, strict=True) if role == -1]
        if not targets:
            samples = next(len(value) for value, role in zip(tensors, self.roles, strict=True) if role is not None)
            return torch.zeros(samples, 1)
        is_exact = all(torch.equal(value.float().to(value.dtype), value) for value in targets)
        dtype = torch.float32 if is_exact else torch.float64
        return torch.cat([value.reshape(len(value), -1).to(dtype) for value in targets], 1)

    def unpack(self, packed: Tensor, inputs: Sequence[Tensor]) -> Any:
        """Return the batch of inputs and packed targets."""
        sizes = [shape.numel() for shape in self.shapes]
        parts = torch.split(packed, sizes, 1) if sizes else ()
        kinds = zip(parts, self.shapes, self.dtypes, strict=True)
        targets = iter([part.reshape(len(part), *shape).to(dtype) for part, shape, dtype in kinds])
        filled = [None if role is None else next(targets) if role == -1 else inputs[role] for role in self.roles]
        return self.form.fill(filled)


class CallerLoss:
    """The loss of a function of the caller: `loss(outputs, batch)`.

    Args:
        loss: Returns the mean over the samples, a scalar, or one value for each sample, (B,).
        outputs: Form of what the model returns.
        compared: Numbers of the output tensors that have one entry for each sample.
        batch: Form of the batches.
        call: Inputs of the model.
    """

    divergence = None
    reads_labels = True

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        outputs: Form,
        compared: Sequence[int],
        batch: BatchForm,
        call: CallForm,
    ):
        self.name = getattr(loss, "__name__", type(loss).__name__)
        self._loss = loss
        self._outputs = outputs
        self._compared = tuple(compared)
        self._batch = batch
        self._call = call

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallerLoss":
        return self  # a value: copies of a model share it

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return all outputs side by side: (B, N)."""
        return side_by_side(outputs, self._compared)

    def summed_loss(self, outputs: Sequence[Tensor], targets: Tensor, inputs: Tensor) -> Tensor:
        """Return the loss summed over samples."""
        batch = self._batch.unpack(targets, self._call.unpack(inputs))
        value = self._loss(self._outputs.fill(outputs), batch)
        return value.sum() if value.ndim else value * len(targets)

    def distances(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return the squared distances of all outputs, (B,)."""
        return squared_distances(self.logits(outputs), self.logits(wanted))
