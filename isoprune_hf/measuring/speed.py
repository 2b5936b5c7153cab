"""Measure how long a forward pass takes.

`measure_latency` returns medians in milliseconds; `time_models` returns the times of every pass, and whether the
machine was busy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.errors import RecipeError
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.measuring.runtimes.opened import open_models
from isoprune_hf.measuring.timing import Rounds, Timing
from isoprune_hf.recipes.values import DType, Precision, RuntimeName

_DTYPES: Mapping[Precision, DType | None] = {"no": None, "bf16": "bf16"}


def runtime_of(backend: RuntimeName, precision: Precision) -> Runtime:
    """Return the runtime of two settings of a recipe; with the precision `no` a model keeps its own dtype."""
    return Runtime(backend, _DTYPES[precision])


def measure_latency(
    models: Mapping[str, IsoPruneForImageClassification],
    image_size: Sequence[int],
    *,
    batch_size: int = 1,
    runtime: Runtime = Runtime(),  # noqa: B008 a frozen value
    repeats: int = 20,
    warmup: int = 3,
) -> dict[str, float]:
    """Measure the median time of a forward pass of each model, on its own device.

    Args:
        models: Models by name; they are not changed.
        image_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        runtime: Where they run. `compile` drops everything that the process has compiled before.
        repeats: Timed passes of each model.
        warmup: Untimed passes of each model before them; most runtimes make at least one.

    Returns:
        Milliseconds for one batch, by name.

    Raises:
        RecipeError: A number is too small, or the runtime does not work on this machine or for a model.

    Note:
        The models are called in turns, so that other load on the machine affects all of them alike.
    """
    rounds = Rounds(repeats, warmup)
    return time_models(models, image_size, batch_size=batch_size, runtime=runtime, rounds=rounds).medians()


def time_models(
    models: Mapping[str, IsoPruneForImageClassification],
    image_size: Sequence[int],
    *,
    batch_size: int,
    runtime: Runtime,
    rounds: Rounds,
) -> Timing:
    """Time every forward pass of some models; the arguments are those of `measure_latency`.

    Raises:
        RecipeError: See `measure_latency`.
    """
    check_counts(batch_size=batch_size, repeats=rounds.repeats, warmup=rounds.warmup)
    with open_models(models, image_size, runtime) as opened:
        return opened.time(batch_size, rounds)


@contextmanager
def time_against(
    base: IsoPruneForImageClassification, *, batch_size: int, runtime: Runtime, rounds: Rounds
) -> Iterator[Callable[[IsoPruneForImageClassification], Timing]]:
    """Open a base once; yield a function that times `base` and another model, named `pruned`, in turns.

    Args:
        base: The base; its image size is that of the measurement.
        batch_size: Images in the batch.
        runtime: Where both run.
        rounds: How often.
    """
    size = image_size_of(base)
    with open_models({"base": base}, size, runtime) as dense:

        def time_pruned(model: IsoPruneForImageClassification) -> Timing:
            with open_models({"pruned": model}, size, runtime) as pruned:
                return pruned.time(batch_size, rounds, beside=dense)

        yield time_pruned


def record_measurement(device: torch.device, runtime: Runtime, *, batch_size: int, repeats: int) -> dict[str, Any]:
    """Describe a measurement by plain values, which are saved with its figures."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": runtime.threads or torch.get_num_threads(),
        "batch_size": batch_size,
        "precision": "bf16" if runtime.dtype == "bf16" else "no",
        "backend": runtime.name,
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
