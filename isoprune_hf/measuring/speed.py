"""Measure how long a forward pass takes.

`measure_latency` returns medians in milliseconds; `time_models` and `time_calls` return the time of every pass.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.errors import RecipeError
from isoprune_hf.measuring.backends import BACKENDS, Backend, Forward
from isoprune_hf.recipes.values import Precision

_MIN_ROUNDS = 5  # timed rounds before a time limit ends a measurement


@dataclass(frozen=True)
class Rounds:
    """Numbers of calls in a measurement. In a round, every model is called once.

    Args:
        repeats: Timed rounds.
        warmup: Untimed rounds before them.
        seconds: No new round starts after the timed rounds took this long, but at least five are run.
    """

    repeats: int
    warmup: int
    seconds: float = math.inf


def measure_latency(
    models: Mapping[str, nn.Module],
    image_size: Sequence[int],
    *,
    batch_size: int = 1,
    precision: Precision = "no",
    backend: Backend = "eager",
    repeats: int = 20,
    warmup: int = 3,
) -> dict[str, float]:
    """Measure the median time of a forward pass of each model, on its own device.

    Args:
        models: Models by name; they are not changed.
        image_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        precision: `no` times a model in its own dtype, `bf16` a copy of it.
        backend: `eager`, or `compile` for `torch.compile`, which drops everything the process has compiled before.
        repeats: Timed passes of each model.
        warmup: Untimed passes of each model before them; `compile` makes at least one.

    Returns:
        Milliseconds for one batch, by name.

    Raises:
        RecipeError: A number is too small, or `torch.compile` does not work on this machine.

    Note:
        The models are called in turns, so that other load on the machine affects all of them alike.
    """
    times = time_models(
        models,
        image_size,
        batch_size=batch_size,
        precision=precision,
        backend=backend,
        rounds=Rounds(repeats, warmup),
    )
    return {name: statistics.median(milliseconds) for name, milliseconds in times.items()}


def time_models(
    models: Mapping[str, nn.Module],
    image_size: Sequence[int],
    *,
    batch_size: int,
    precision: Precision,
    backend: Backend,
    rounds: Rounds,
) -> dict[str, list[float]]:
    """Time every forward pass of some models; the arguments are those of `measure_latency`.

    Returns:
        Milliseconds of each pass, by name.

    Raises:
        RecipeError: See `measure_latency`.
    """
    check_counts(batch_size=batch_size, repeats=rounds.repeats, warmup=rounds.warmup)
    used = BACKENDS[backend]
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        for model in models.values():
            model.eval()
        with used.session():
            cast_models = {name: with_precision(model, precision) for name, model in models.items()}
            calls = {
                name: partial(_time_forward, used.prepare(model), draw_images(model, image_size, batch_size))
                for name, model in cast_models.items()
            }
            with torch.inference_mode():
                return time_calls(calls, Rounds(rounds.repeats, max(rounds.warmup, used.min_warmup), rounds.seconds))
    finally:
        for module, training in modes:
            module.training = training


def time_calls(calls: Mapping[str, Callable[[], float]], rounds: Rounds) -> dict[str, list[float]]:
    """Make some calls in turns and collect the time that each one reports.

    Args:
        calls: Name -> a call that returns the seconds it took.
        rounds: How often each of them is made.

    Returns:
        Milliseconds of each timed call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    for number in range(rounds.warmup + rounds.repeats):
        if number >= rounds.warmup + _MIN_ROUNDS and spent > rounds.seconds:
            break
        for name, call in calls.items():
            taken = call()
            if number >= rounds.warmup:
                times[name].append(1000 * taken)
                spent += taken
    return times


def measure_pair(
    base: IsoPruneForImageClassification,
    pruned: IsoPruneForImageClassification,
    *,
    batch_size: int = 1,
    precision: Precision = "no",
    backend: Backend = "eager",
    repeats: int = 20,
) -> tuple[float, float]:
    """Measure a base and a pruned model in turns.

    Returns:
        Milliseconds for one batch of the base and of the pruned model; see `measure_latency`.
    """
    times = measure_latency(
        {"base": base, "pruned": pruned},
        image_size_of(base),
        batch_size=batch_size,
        precision=precision,
        backend=backend,
        repeats=repeats,
    )
    return times["base"], times["pruned"]


def record_measurement(
    device: torch.device, *, batch_size: int, precision: Precision, backend: Backend, repeats: int
) -> dict[str, Any]:
    """Describe a measurement by plain values, which are saved with its figures."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "precision": precision,
        "backend": backend,
        "torch": str(torch.__version__),
        "repeats": repeats,
    }


def check_counts(**counts: int) -> None:
    """Check the counts of a measurement: `warmup` may be 0, all others start at 1.

    Raises:
        RecipeError: A count is too small.
    """
    for name, value in counts.items():
        minimum = 0 if name == "warmup" else 1
        if value < minimum:
            raise RecipeError(f"{name} must be at least {minimum}, got {value}")


def draw_images(model: nn.Module, image_size: Sequence[int], batch_size: int) -> torch.Tensor:
    """Return random images (B, C, H, W) on the device and in the dtype of a model, the same ones on every call."""
    pixels = torch.randn(batch_size, *image_size, generator=torch.Generator().manual_seed(0))
    return pixels.to(next(model.parameters()))


def with_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """Return the model itself, or a copy of it in bf16."""
    return copy.deepcopy(model).to(torch.bfloat16) if precision == "bf16" else model


def _time_forward(forward: Forward, pixels: torch.Tensor) -> float:
    """Return the seconds of one forward pass."""
    _synchronize(pixels.device)
    start = time.perf_counter()
    forward(pixels)
    _synchronize(pixels.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
