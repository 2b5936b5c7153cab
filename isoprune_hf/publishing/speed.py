"""How long a forward pass takes."""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from isoprune_hf.errors import RecipeError


def measure_latency(
    models: Mapping[str, nn.Module],
    image_size: Sequence[int],
    *,
    batch_size: int = 1,
    repeats: int = 20,
    warmup: int = 3,
) -> dict[str, float]:
    """Measure the median time of a forward pass of each model, on its own device and in its own dtype.

    Args:
        models: Models by name.
        image_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        repeats: Timed passes of each model.
        warmup: Passes of each model before, untimed.

    Returns:
        Milliseconds for one batch, by name.

    Raises:
        RecipeError: A number is too small.

    Note:
        The models take turns, so that what else the machine does hits all of them alike.
    """
    for name, value, low in (("batch_size", batch_size, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < low:
            raise RecipeError(f"{name} must be at least {low}, got {value}")
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    pixels = torch.randn(batch_size, *image_size, generator=torch.Generator().manual_seed(0))
    inputs = {name: pixels.to(next(model.parameters())) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            for turn in range(warmup + repeats):
                for name, model in models.items():
                    seconds = _time_forward(model, inputs[name])
                    if turn >= warmup:
                        times[name].append(seconds)
    finally:
        for module, training in modes:
            module.training = training
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


def _time_forward(model: nn.Module, pixels: torch.Tensor) -> float:
    _synchronize(pixels.device)
    start = time.perf_counter()
    model(pixels)
    _synchronize(pixels.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
