"""What a snapshot holds of a training: all that the next update depends on, and nothing of one rank alone."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.nn import Module

from isoprune_hf.checkpoint.snapshots import Snapshot
from isoprune_hf.training.epoch import Progress, Training


def capture(training: Training, progress: Progress, **notes: Any) -> Snapshot:
    """Copy the state of a training to the CPU.

    Random numbers have no state: order, augmentation, mixing and dropout are drawn from (seed, epoch, update, part or
    image). Weights, optimizer and average are equal on all ranks, so those of one are enough.
    """
    groups = {"model": training.model.state_dict()}
    if training.ema is not None:
        groups["ema"] = training.ema.module.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for part, values in _optimizer_parts(training.optimizer.state_dict()):
        groups[part] = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        numbers[part] = {name: value for name, value in values.items() if isinstance(value, int | float)}
    # A copy, since tied weights share their memory and safetensors holds no two tensors that do.
    tensors = {
        f"{group}.{name}": value.detach().to("cpu", copy=True)
        for group, values in groups.items()
        for name, value in values.items()
    }
    values = {"progress": asdict(progress), "scaler": training.scaler.state_dict(), "optimizer": numbers, **notes}
    return Snapshot(progress.epoch, progress.update, tensors, values)


def restore(training: Training, snapshot: Snapshot) -> Progress:
    """Put a state into `training`, in place; returns where it stands."""
    _load(training.model, _group(snapshot.tensors, "model"))
    if training.ema is not None:
        _load(training.ema.module, _group(snapshot.tensors, "ema"))
    # The groups are those of the recipe, which is the same, but for what their optimizer counts in them.
    state, groups = {}, training.optimizer.state_dict()["param_groups"]
    for part, numbers in snapshot.values["optimizer"].items():
        kind, _, number = part.rpartition(".")
        values = {**numbers, **_group(snapshot.tensors, part)}
        if kind == "optimizer.group":
            groups[int(number)] |= values
        elif values:
            state[int(number)] = values
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})
    training.scaler.load_state_dict(snapshot.values["scaler"])
    return Progress(**snapshot.values["progress"])


def _load(module: Module, tensors: dict[str, Tensor]) -> None:
    state = module.state_dict()
    state.clear()  # but for the versions that it carries: torchvision's MNASNet loads nothing without them
    state.update(tensors)
    module.load_state_dict(state)


def _optimizer_parts(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give what an optimizer keeps for each parameter, and what it keeps in each group, with names."""
    for number, values in state["state"].items():
        yield f"optimizer.parameter.{number}", values
    for number, values in enumerate(state["param_groups"]):
        yield f"optimizer.group.{number}", values


def _group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    prefix = f"{group}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
