"""How long a forward pass takes."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError

Precision = Literal["no", "bf16"]
Backend = Literal["eager", "compile"]
_FEWEST_TURNS = 5


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
        models: Models by name; left untouched.
        image_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        precision: no times a model in its own dtype, bf16 a copy of it.
        backend: eager, or compile for `torch.compile`, which forgets what the process has compiled before.
        repeats: Timed passes of each model.
        warmup: Passes of each model before, untimed; compile takes at least one.

    Returns:
        Milliseconds for one batch, by name.

    Raises:
        RecipeError: A number is too small, or `torch.compile` does not work here.

    Note:
        The models take turns, so that what else the machine does hits all of them alike.
    """
    settings = {"batch_size": batch_size, "precision": precision, "backend": backend}
    times = time_models(models, image_size, repeats=repeats, warmup=warmup, **settings)
    return {name: statistics.median(milliseconds) for name, milliseconds in times.items()}


def time_models(
    models: Mapping[str, nn.Module],
    image_size: Sequence[int],
    *,
    batch_size: int,
    precision: Precision,
    backend: Backend,
    repeats: int,
    warmup: int,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Time forward passes one by one: see `measure_latency`, and `time_calls` for `seconds`.

    Returns:
        Milliseconds of each pass, by name.
    """
    check_counts(batch_size=batch_size, repeats=repeats, warmup=warmup)
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        for model in models.values():
            model.eval()
        if backend == "compile":
            torch.compiler.reset()  # every model is one more entry of the same cache, which is small
            warmup = max(warmup, 1)
        ready = {name: _prepare(model, precision, backend) for name, model in models.items()}
        inputs = {name: draw_images(model, image_size, batch_size) for name, model in ready.items()}
        calls = {name: partial(_forward, model, inputs[name]) for name, model in ready.items()}
        with torch.inference_mode():
            return time_calls(calls, repeats=repeats, warmup=warmup, seconds=seconds)
    except RuntimeError as error:  # torch._dynamo's errors are of this kind, and slow to import
        if backend == "eager":
            raise
        cause = " ".join(str(error).split())[:200]
        raise RecipeError(f"torch.compile does not work here ({cause}); measure with latency_backend eager") from error
    finally:
        for module, training in modes:
            module.training = training


def time_calls(
    calls: Mapping[str, Callable[[], float]], *, repeats: int, warmup: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Let calls take turns, and collect what each says it took.

    Args:
        calls: By name; each gives the seconds that it took.
        repeats: Turns that count.
        warmup: Turns before, which do not.
        seconds: No further turn begins after so long, once there are five.

    Returns:
        Milliseconds of each turn, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    for turn in range(warmup + repeats):
        if turn >= warmup + _FEWEST_TURNS and spent > seconds:
            break
        for name, call in calls.items():
            taken = call()
            if turn >= warmup:
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
    """Measure base and pruned model in turns; returns the milliseconds of both (see `measure_latency`)."""
    times = measure_latency(
        {"base": base, "pruned": pruned},
        base.config.image_size,
        batch_size=batch_size,
        precision=precision,
        backend=backend,
        repeats=repeats,
    )
    return times["base"], times["pruned"]


def record_measurement(
    device: torch.device, *, batch_size: int, precision: Precision, backend: Backend, repeats: int
) -> dict[str, Any]:
    """Describe a measurement by plain values, so that a figure says what it is a figure of."""
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
    """Check the numbers of a measurement.

    Raises:
        RecipeError: One is too small.
    """
    for name, value in counts.items():
        low = 0 if name == "warmup" else 1
        if value < low:
            raise RecipeError(f"{name} must be at least {low}, got {value}")


def draw_images(model: nn.Module, image_size: Sequence[int], batch_size: int) -> torch.Tensor:
    """Draw images (B, C, H, W) on the device and in the dtype of a model, the same ones every time."""
    pixels = torch.randn(batch_size, *image_size, generator=torch.Generator().manual_seed(0))
    return pixels.to(next(model.parameters()))


def with_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """Return the model itself, or a copy of it in bf16."""
    return copy.deepcopy(model).to(torch.bfloat16) if precision == "bf16" else model


def _prepare(model: nn.Module, precision: Precision, backend: Backend) -> nn.Module:
    model = with_precision(model, precision)
    return torch.compile(model, dynamic=False) if backend == "compile" else model


def _forward(model: nn.Module, pixels: torch.Tensor) -> float:
    _synchronize(pixels.device)
    start = time.perf_counter()
    model(pixels)
    _synchronize(pixels.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
