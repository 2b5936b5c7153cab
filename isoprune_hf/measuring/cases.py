"""Time base and pruned model in several runtimes, dtypes and batch sizes; call `measure_cases`."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.errors import RecipeError
from isoprune_hf.extras import require_package
from isoprune_hf.measuring.exported import ExportedFile, open_exported
from isoprune_hf.measuring.memory import peak_memory
from isoprune_hf.measuring.runtimes.engine import Runtime, RuntimeFailedError
from isoprune_hf.measuring.runtimes.opened import open_models
from isoprune_hf.measuring.runtimes.registry import ENGINES, missing_packages
from isoprune_hf.measuring.speed import check_counts
from isoprune_hf.measuring.timing import Rounds, Timing
from isoprune_hf.recipes.values import DType, RuntimeName
from isoprune_hf.terminal import with_bar

Models = Mapping[str, IsoPruneForImageClassification]
_WARMUP = 3
_MIN_REPEATS = 5


@dataclass(frozen=True)
class BenchmarkSettings:
    """The cases of a benchmark: every combination of runtime, dtype and batch size.

    Args:
        batch_sizes: Images in a batch.
        dtypes: `fp32`, `bf16`.
        runtimes: Names of runtimes; none takes all that are installed.
        exported: Files of the pruned model, each timed in its runtime beside the base in fp32.
        repeats: Timed passes of each model; at least five.
        seconds: Time limit of a measurement, applied once each model has been timed five times. A case is measured up
            to three times if the machine is busy.

    Raises:
        RecipeError: A setting is out of range.
        MissingExtraError: A package that a named runtime needs is missing.
    """

    batch_sizes: Sequence[int] = (1, 16, 64)
    dtypes: Sequence[DType] = ("fp32", "bf16")
    runtimes: Sequence[RuntimeName] = ()
    exported: Sequence[ExportedFile] = ()
    repeats: int = 20
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "dtypes"):
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
        for name in (*self.runtimes, *(file.runtime for file in self.exported)):
            for package in ENGINES[name].packages:
                require_package(package, f"the runtime {name} (omit it from --runtimes)")


class Quartiles(TypedDict):
    """Median and quartiles of some times, in milliseconds."""

    median: float
    low: float
    high: float


class CaseRecord(TypedDict):
    """The figures of one case.

    Attributes:
        dtype: A dtype, or the precision of an exported file, which is compared with the base in fp32.
        cpu: Median milliseconds of CPU time, of all threads, by model.
        faster: Median of the base divided by that of the pruned model.
        of_promised: `faster` divided by the ratio of the MACs.
        is_exported: The pruned model is an exported file.
        of_fastest: Median of the fastest base in any runtime and dtype, at this batch size, divided by that of the
            pruned model.
        busy: Why the machine counts as busy; such figures are shown, and not stored.
    """

    runtime: RuntimeName
    dtype: str
    batch_size: int
    turns: int
    base: Quartiles
    pruned: Quartiles
    cpu: dict[str, float]
    faster: float
    of_promised: float
    is_exported: NotRequired[bool]
    of_fastest: NotRequired[float]
    busy: NotRequired[str]
    memory: NotRequired[dict[str, int]]


class CaseNote(NamedTuple):
    """A runtime and dtype that could not be measured on this machine, or not as intended, and why."""

    runtime: RuntimeName
    dtype: str | None
    reason: str

    def __str__(self) -> str:
        """Return the note as a line."""
        label = ENGINES[self.runtime].label
        return f"{label} in {self.dtype}: {self.reason}" if self.dtype else f"{label}: {self.reason}"


class Measured(NamedTuple):
    """The result of `measure_cases`.

    Attributes:
        rows: Figures of each case.
        left_out: Cases that could not be measured.
        notes: What was not done to a model in a case.
    """

    rows: list[CaseRecord]
    left_out: list[CaseNote]
    notes: list[CaseNote]


def measure_cases(models: Models, settings: BenchmarkSettings, *, promised: float) -> Measured:
    """Time `base` and `pruned` in turns, case by case.

    Args:
        models: `base` and `pruned`, on one device; they are not changed.
        settings: The cases.
        promised: MACs of the base divided by those of the pruned model.
    """
    measured = Measured([], [], [])
    named = settings.runtimes or tuple(ENGINES)
    for name in with_bar(named, "benchmark", "runtime"):
        missing = missing_packages(name)
        if missing:
            measured.left_out.append(CaseNote(name, None, f"{', '.join(missing)} not installed"))
            continue
        for dtype in settings.dtypes:
            reason = ENGINES[name].limitation(dtype, models["base"].device)
            try:
                if reason is None:
                    _measure_sizes(measured, models, settings, Runtime(name, dtype), dtype=dtype, promised=promised)
            except RuntimeFailedError as error:
                reason = error.reason
            if reason is not None:
                measured.left_out.append(CaseNote(name, dtype, reason))
    for exported in settings.exported:
        _measure_exported(measured, models, settings, exported, promised=promised)
    return measured


def _measure_sizes(
    measured: Measured,
    models: Models,
    settings: BenchmarkSettings,
    runtime: Runtime,
    *,
    dtype: DType,
    promised: float,
) -> None:
    """Open the models once, and add a record for each batch size."""
    size = image_size_of(models["base"])
    rounds = Rounds(settings.repeats, _WARMUP, settings.seconds)
    with open_models(models, size, runtime) as opened:
        measured.notes.extend(CaseNote(runtime.name, dtype, note) for note in opened.notes)
        for batch_size in settings.batch_sizes:
            record = record_case(runtime.name, dtype, batch_size, opened.time(batch_size, rounds), promised=promised)
            if runtime.name == "eager":
                record["memory"] = {
                    key: peak_memory(model, size, batch_size=batch_size, dtype=dtype) for key, model in models.items()
                }
            measured.rows.append(record)


def _measure_exported(
    measured: Measured, models: Models, settings: BenchmarkSettings, exported: ExportedFile, *, promised: float
) -> None:
    """Open an exported file and the base in its runtime once, and add a record for each batch size."""
    name, precision, _ = exported
    reason = ENGINES[name].limitation("fp32", models["base"].device)
    if reason is not None:
        measured.left_out.append(CaseNote(name, precision, reason))
        return
    size = image_size_of(models["base"])
    rounds = Rounds(settings.repeats, _WARMUP, settings.seconds)
    pruned = open_exported(exported, models["pruned"], size)
    with open_models({"base": models["base"]}, size, Runtime(name, "fp32")) as base:
        for batch_size in settings.batch_sizes:
            timing = pruned.time(batch_size, rounds, beside=base)
            record = record_case(name, precision, batch_size, timing, promised=promised)
            record["is_exported"] = True
            measured.rows.append(record)


def record_case(runtime: RuntimeName, dtype: str, batch_size: int, timing: Timing, *, promised: float) -> CaseRecord:
    """Summarize the times of one case.

    Args:
        runtime: Name of the runtime.
        dtype: Dtype of the models, or precision of an exported file.
        batch_size: Images in the batch.
        timing: Times of `base` and `pruned`.
        promised: MACs of the base divided by those of the pruned model.
    """
    base, pruned = (quartiles(timing.passes[name].wall) for name in ("base", "pruned"))
    faster = base["median"] / pruned["median"]
    record: CaseRecord = {
        "runtime": runtime,
        "dtype": dtype,
        "batch_size": batch_size,
        "turns": len(timing.passes["base"].wall),
        "base": base,
        "pruned": pruned,
        "cpu": {name: statistics.median(passes.cpu) for name, passes in timing.passes.items()},
        "faster": faster,
        "of_promised": faster / promised,
    }
    if timing.busy is not None:
        record["busy"] = timing.busy
    return record


def quartiles(times: Sequence[float]) -> Quartiles:
    """Return the median and the quartiles of at least two times."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": statistics.median(times), "low": low, "high": high}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the name of the device, the threads of PyTorch, and the versions of the installed runtimes."""
    installed = [package for package in ("onnxruntime", "openvino") if not missing_packages(package)]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", *installed)},
    }


def _cpu_name() -> str:
    """Return the name of the processor on Linux, and its architecture elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] not in ("", "unknown") else f"CPU ({platform.machine()})"
