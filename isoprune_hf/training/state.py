"""What a snapshot holds of a training: all that the next update depends on, and nothing of one rank alone."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from isoprune_hf.training.epoch import Progress, Training
from isoprune_hf.training.snapshots import Snapshot


def capture(training: Training, progress: Progress, **notes: Any) -> Snapshot:
    """Copy the state of a training to the CPU.

    Random numbers have no state: order, augmentation, mixing and dropout are drawn from (seed, epoch, update, part or
    image). Weights, optimizer and average are equal on all ranks, so those of one are enough.
    """
    groups = {"model": training.model.state_dict()}
    if training.ema is not None:
        groups["ema"] = training.ema.module.state_dict()
    for number, values in training.optimizer.state_dict()["state"].items():
        groups[f"optimizer.{number}"] = {name: value for name, value in values.items() if value is not None}
    # A copy, since tied weights share their memory and safetensors holds no two tensors that do.
    tensors = {
        f"{group}.{name}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for group, values in groups.items()
        for name, value in values.items()
    }
    values = {"progress": asdict(progress), "scaler": training.scaler.state_dict(), **notes}
    return Snapshot(progress.epoch, progress.update, tensors, values)


def restore(training: Training, snapshot: Snapshot) -> Progress:
    """Put a state into `training`, in place; returns where it stands."""
    training.model.load_state_dict(_group(snapshot.tensors, "model"))
    if training.ema is not None:
        training.ema.module.load_state_dict(_group(snapshot.tensors, "ema"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _group(snapshot.tensors, "optimizer").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    # The groups are those of the recipe, which is the same; the learning rate is a function of the update.
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})
    training.scaler.load_state_dict(snapshot.values["scaler"])
    return Progress(**snapshot.values["progress"])


def _group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    prefix = f"{group}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
