"""Time base and pruned model in several runtimes, dtypes and batch sizes; call `measure_cases`."""

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import torch

from isoprune_hf.errors import RecipeError
from isoprune_hf.extras import require_package
from isoprune_hf.measuring.backends import BackendError
from isoprune_hf.measuring.runtimes import DType, Models, Runtime
from isoprune_hf.measuring.speed import Rounds, check_counts
from isoprune_hf.terminal import with_bar

RuntimeName = Literal["eager", "compile", "onnx"]
_WARMUP = 3
_MIN_REPEATS = 5


@dataclass(frozen=True)
class BenchmarkSettings:
    """The cases of a benchmark: every combination of runtime, dtype and batch size.

    Args:
        batch_sizes: Images in a batch.
        dtypes: `fp32`, `bf16`.
        runtimes: `eager`, `compile` (`torch.compile`), `onnx` (ONNX Runtime, only on the CPU and in fp32).
        repeats: Timed passes of each model; at least five.
        seconds: Time limit of a case, applied once each model has been timed five times.

    Raises:
        RecipeError: A setting is out of range.
        MissingExtraError: A package that `onnx` needs is missing.
    """

    batch_sizes: Sequence[int] = (1, 16, 64)
    dtypes: Sequence[DType] = ("fp32", "bf16")
    runtimes: Sequence[RuntimeName] = ("eager", "compile", "onnx")
    repeats: int = 20
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "dtypes", "runtimes"):
            if not getattr(self, name):
                raise RecipeError(f"{name} needs at least one entry, got none")
        for index, size in enumerate(self.batch_sizes):
            check_counts(**{f"batch_sizes[{index}]": size})
        if self.repeats < _MIN_REPEATS:
            raise RecipeError(
                f"repeats must be at least {_MIN_REPEATS} for quartiles to mean something, got {self.repeats}"
            )
        if not self.seconds > 0:
            raise RecipeError(f"seconds must be above 0, got {self.seconds}")
        if "onnx" in self.runtimes:
            for package in ("onnx", "onnxscript", "onnxruntime"):
                require_package(package, 'the runtime onnx (omit it with --runtimes "[eager,compile]")')


class Quartiles(TypedDict):
    """Median and quartiles of some times, in milliseconds."""

    median: float
    low: float
    high: float


class CaseRecord(TypedDict):
    """The figures of one case; `of_promised` is the measured speed-up divided by that of the MACs."""

    runtime: RuntimeName
    dtype: DType
    batch_size: int
    turns: int
    base: Quartiles
    pruned: Quartiles
    faster: float
    of_promised: float
    memory: NotRequired[dict[str, int]]


class UnmeasuredCase(NamedTuple):
    """A runtime and dtype that could not be measured on this machine, and why."""

    runtime: RuntimeName
    dtype: DType
    reason: str


def measure_cases(
    models: Models,
    settings: BenchmarkSettings,
    runtimes: Mapping[RuntimeName, Callable[[], Runtime]],
    *,
    promised: float,
) -> tuple[list[CaseRecord], list[UnmeasuredCase]]:
    """Time `base` and `pruned` in turns, case by case.

    Args:
        models: `base` and `pruned`, on one device; they are not changed.
        settings: The cases.
        runtimes: Name -> function that opens the models in this runtime.
        promised: MACs of the base divided by those of the pruned model.

    Returns:
        A record of each case, and the cases that could not be measured.
    """
    records: list[CaseRecord] = []
    unmeasured: list[UnmeasuredCase] = []
    rounds = Rounds(settings.repeats, _WARMUP, settings.seconds)
    for name in with_bar(settings.runtimes, "benchmark", "runtime"):
        runtime = runtimes[name]()
        for dtype in settings.dtypes:
            reason = runtime.limitation(dtype, models["base"].device)
            for batch_size in settings.batch_sizes if reason is None else ():
                try:
                    times = runtime.time_passes(batch_size, dtype, rounds)
                except BackendError as error:
                    reason = error.reason
                    break
                record = record_case(name, dtype, batch_size, times, promised=promised)
                memory = runtime.peak_memory(batch_size, dtype)
                if memory:
                    record["memory"] = memory
                records.append(record)
            if reason is not None:
                unmeasured.append(UnmeasuredCase(name, dtype, reason))
    return records, unmeasured


def record_case(
    runtime: RuntimeName, dtype: DType, batch_size: int, times: Mapping[str, Sequence[float]], *, promised: float
) -> CaseRecord:
    """Summarize the times of one case.

    Args:
        runtime: Name of the runtime.
        dtype: Dtype of the models.
        batch_size: Images in the batch.
        times: `base` and `pruned` -> milliseconds of each pass.
        promised: MACs of the base divided by those of the pruned model.
    """
    base = quartiles(times["base"])
    pruned = quartiles(times["pruned"])
    faster = base["median"] / pruned["median"]
    return {
        "runtime": runtime,
        "dtype": dtype,
        "batch_size": batch_size,
        "turns": len(times["base"]),
        "base": base,
        "pruned": pruned,
        "faster": faster,
        "of_promised": faster / promised,
    }


def quartiles(times: Sequence[float]) -> Quartiles:
    """Return the median and the quartiles of at least two times."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": statistics.median(times), "low": low, "high": high}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the name of the device, the threads of PyTorch, and the versions of the installed runtimes."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name) for name in ("torch", "onnxruntime") if name == "torch" or _is_installed(name)
        },
    }


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except ModuleNotFoundError:
        return False


def _cpu_name() -> str:
    """Return the name of the processor on Linux, and its architecture elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] not in ("", "unknown") else f"CPU ({platform.machine()})"
