"""Capture the state of a training in a snapshot, and restore it: everything that the next update depends on."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Protocol

from timm.utils.model_ema import ModelEmaV3
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Module
from torch.optim import Optimizer

from isoprune_hf.checkpoint.snapshots import Snapshot
from isoprune_hf.training.progress import Progress


class Stateful(Protocol):
    """A model in training; `Student` is one."""

    @property
    def model(self) -> Module: ...
    @property
    def ema(self) -> ModelEmaV3 | None: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def scaler(self) -> GradScaler: ...


def capture(student: Stateful, progress: Progress, **notes: Any) -> Snapshot:
    """Copy the state of a training to the CPU.

    Random generators are not part of it: order, augmentation, mixing and dropout are drawn from (seed, epoch, update,
    part or image). Weights, optimizer and average are equal on all ranks, so the state of one rank is enough.

    Args:
        student: The model in student.
        progress: Its position.
        notes: Further values of the snapshot.
    """
    groups = {"model": student.model.state_dict()}
    if student.ema is not None:
        groups["ema"] = student.ema.module.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for part, values in _optimizer_parts(student.optimizer.state_dict()):
        groups[part] = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        numbers[part] = {name: value for name, value in values.items() if isinstance(value, int | float)}
    # A copy, since tied weights share memory, which safetensors does not allow.
    tensors = {
        f"{group}.{name}": value.detach().to("cpu", copy=True)
        for group, values in groups.items()
        for name, value in values.items()
    }
    values = {"progress": asdict(progress), "scaler": student.scaler.state_dict(), "optimizer": numbers, **notes}
    return Snapshot(progress.epoch, progress.update, tensors, values)


def restore(student: Stateful, snapshot: Snapshot) -> Progress:
    """Restore a snapshot into `student` in place; return its progress."""
    _load(student.model, _group(snapshot.tensors, "model"))
    if student.ema is not None:
        _load(student.ema.module, _group(snapshot.tensors, "ema"))
    # The groups come from the recipe, which is the same; some optimizers also keep counters in them.
    state: dict[int, dict[str, Any]] = {}
    groups = student.optimizer.state_dict()["param_groups"]
    for part, numbers in snapshot.values["optimizer"].items():
        kind, _, number = part.rpartition(".")
        values = {**numbers, **_group(snapshot.tensors, part)}
        if kind == "optimizer.group":
            groups[int(number)] |= values
        elif values:
            state[int(number)] = values
    student.optimizer.load_state_dict({"state": state, "param_groups": groups})
    student.scaler.load_state_dict(snapshot.values["scaler"])
    return Progress(**snapshot.values["progress"])


def _load(module: Module, tensors: dict[str, Tensor]) -> None:
    state = module.state_dict()
    state.clear()  # keeps its metadata with the versions of the modules, which torchvision's MNASNet needs
    state.update(tensors)
    module.load_state_dict(state)


def _optimizer_parts(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the optimizer's state of each parameter and of each group, with a name."""
    for number, values in state["state"].items():
        yield f"optimizer.parameter.{number}", values
    for number, values in enumerate(state["param_groups"]):
        yield f"optimizer.group.{number}", values


def _group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    prefix = f"{group}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
