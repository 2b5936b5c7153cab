"""Find out with torch.profiler which types of modules a forward pass spends its time in: `share_of_modules`."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from isoprune_hf.measuring.images import draw_images

_RANGE = "module:"
_PASSES = 3


def share_of_modules(model: nn.Module, image_size: Sequence[int], *, batch_size: int = 1) -> dict[str, float]:
    """Return the share of an eager pass that each type of module takes, without the modules inside it.

    Args:
        model: The model in eval mode, on its device; it is not changed.
        image_size: (C, H, W) of one image.
        batch_size: Images in the batch.

    Returns:
        Type -> share of the time of the processor, or of the kernels on a GPU, from the largest. Convolutions with one
        input channel per group are a type of their own.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports start, stop and a missing GPU to standard error
    pixels = draw_images(model, image_size, batch_size)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if pixels.is_cuda else [])]
    ranges: list[record_function] = []
    hooks = [hook for module in model.modules() for hook in _mark(module, ranges)]
    try:
        with torch.inference_mode():
            model(pixels)
            with profile(activities=activities) as profiled:
                for _ in range(_PASSES):
                    model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return _add_up(profiled.events() or [], "device_time_total" if pixels.is_cuda else "cpu_time_total")


def _mark(module: nn.Module, ranges: list[record_function]) -> list[Any]:
    """Register hooks that record a range around each call of a module."""

    def enter(*_: Any) -> None:
        ranges.append(record_function(f"{_RANGE}{_type_of(module)}"))
        ranges[-1].__enter__()  # type: ignore[no-untyped-call]  # untyped in torch

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]


def _type_of(module: nn.Module) -> str:
    name = type(module).__name__
    is_depthwise = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == module.in_channels > 1
    return f"depthwise {name}" if is_depthwise else name


def _add_up(events: Sequence[Any], unit: str) -> dict[str, float]:
    """Return type -> share, from the events of a profile."""
    spent: dict[str, float] = {}
    for event in events:
        if event.name.startswith(_RANGE):
            name = event.name.removeprefix(_RANGE)
            inside = sum(getattr(inner, unit) for inner in _ranges_in(event))
            spent[name] = spent.get(name, 0.0) + getattr(event, unit) - inside
    total = sum(spent.values()) or 1.0
    return dict(sorted(((name, time / total) for name, time in spent.items()), key=lambda pair: -pair[1]))


def _ranges_in(event: Any) -> list[Any]:
    """Return the ranges of the modules directly inside an event."""
    found = []
    for child in event.cpu_children:
        found += [child] if child.name.startswith(_RANGE) else _ranges_in(child)
    return found
