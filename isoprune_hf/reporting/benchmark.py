"""An honest speed report: base against pruned in turns, what MACs promise beside what the clock says, and why."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.export.export import write_onnx
from isoprune_hf.extras import require_package
from isoprune_hf.measuring.memory import peak_memory
from isoprune_hf.measuring.speed import check_counts, draw_images, time_calls, time_models
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.reporting.speed_reasons import explain_speed, look_at_layers
from isoprune_hf.reporting.tables import align_columns

Runtime = Literal["eager", "compile", "onnx"]
Width = Literal["fp32", "bf16"]
_WARMUP = 3
_HEADINGS = ["runtime", "dtype", "batch", "base ms", "pruned ms", "faster", "of MACs", "base MB", "pruned MB"]
_NAMES = {"eager": "eager", "compile": "torch.compile", "onnx": "ONNX Runtime"}


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured.

    Args:
        batch_sizes: Images in a batch.
        dtypes: fp32, bf16.
        runtimes: eager, compile (`torch.compile`), onnx (ONNX Runtime, on the CPU and in fp32 only).
        repeats: Timed passes of each model; at least five.
        seconds: After so long, a row that has five passes of each model is done.
    """

    batch_sizes: Sequence[int] = (1, 16, 64)
    dtypes: Sequence[Width] = ("fp32", "bf16")
    runtimes: Sequence[Runtime] = ("eager", "compile", "onnx")
    repeats: int = 20
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "dtypes", "runtimes"):
            if not getattr(self, name):
                raise RecipeError(f"{name} must name at least one, got none")
        check_counts(**{f"batch_sizes[{index}]": size for index, size in enumerate(self.batch_sizes)})
        if self.repeats < 5:
            raise RecipeError(f"repeats must be at least 5, got {self.repeats}: fewer have no spread")
        if not self.seconds > 0:
            raise RecipeError(f"seconds must be above 0, got {self.seconds}")
        if "onnx" in self.runtimes:
            for package in ("onnx", "onnxscript", "onnxruntime"):
                require_package(package, 'the runtime onnx (leave it out with --runtimes "[eager,compile]")')


def benchmark_models(
    base: IsoPruneForImageClassification, pruned: IsoPruneForImageClassification, settings: BenchmarkSettings
) -> dict[str, Any]:
    """Measure base and pruned model in turns, in every runtime, dtype and batch size.

    Args:
        base: The dense base.
        pruned: The pruned model, on the same device; both are left untouched.
        settings: What is measured.

    Returns:
        Plain values for JSON: the machine, the costs, a row for each case, what could not be measured, and a
        sentence that says why MACs and clock differ.
    """
    costs = {"base": count_cost(base).macs, "pruned": count_cost(pruned).macs}
    promised = costs["base"] / costs["pruned"]
    models, rows, left_out = {"base": base, "pruned": pruned}, [], []
    with TemporaryDirectory() as folder:
        sessions = _Sessions(models, Path(folder))
        for runtime in settings.runtimes:
            for dtype in settings.dtypes:
                reason = _impossible(runtime, dtype, base.device)
                for batch_size in settings.batch_sizes if reason is None else ():
                    try:
                        times = _time(models, sessions, runtime, dtype, batch_size, settings)
                    except RecipeError as error:
                        reason = str(error).partition(";")[0]
                        break
                    memory = _memory(models, dtype, batch_size) if runtime == "eager" else None
                    rows.append(_row(runtime, dtype, batch_size, times, promised, memory))
                if reason is not None:
                    left_out.append(f"{_NAMES[runtime]} in {dtype}: {reason}")
    record = {"machine": _describe_machine(base.device), "macs": costs, "promised": promised, "rows": rows}
    record |= {"left_out": left_out, "settings": {"repeats": settings.repeats, "seconds": settings.seconds}}
    record["layers"] = look_at_layers(pruned)
    record["reason"] = explain_speed(record) if rows else None
    return record


def benchmark_table(record: Mapping[str, Any]) -> list[list[str]]:
    """Write the rows of a benchmark as cells, the headings first; a column without a figure is left out."""
    body = []
    for row in record["rows"]:
        memory = row.get("memory") or {}
        body.append(
            [
                _NAMES[row["runtime"]],
                row["dtype"],
                str(row["batch_size"]),
                *(_spread(row[name]) for name in ("base", "pruned")),
                f"{row['faster']:.2f}x",
                f"{row['of_promised']:.2f}",
                *(f"{memory[name] / 1e6:.1f}" if name in memory else "" for name in ("base", "pruned")),
            ]
        )
    table = [_HEADINGS, *body]
    keep = [index for index in range(len(_HEADINGS)) if any(row[index] for row in body)]
    return [[row[index] or "-" for index in keep] for row in table]


def benchmark_text(record: Mapping[str, Any]) -> str:
    """Write a benchmark for a terminal."""
    machine = record["machine"]
    lines = [
        f"{machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}; "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items()),
        f"MACs promise {record['promised']:.2f}x; a time is a median with its quartiles",
        "",
        align_columns(benchmark_table(record)),
        *[f"not measured: {entry}" for entry in record["left_out"]],
    ]
    return "\n".join([*lines, *(["", record["reason"]] if record["reason"] else [])])


class _Sessions:
    """Opens base and pruned model in ONNX Runtime, when they are first asked for."""

    def __init__(self, models: Mapping[str, IsoPruneForImageClassification], folder: Path):
        self.models, self.folder = models, folder
        self.opened: dict[str, Callable[[np.ndarray], np.ndarray]] = {}

    def calls(self, batch_size: int) -> dict[str, Callable[[], float]]:
        if not self.opened:
            for name, model in self.models.items():
                self.opened[name] = write_onnx(model, self.folder / f"{name}.onnx", threads=torch.get_num_threads())
        size = self.models["base"].config.image_size
        pixels = draw_images(self.models["base"], size, batch_size).float().cpu().numpy()
        return {name: partial(_seconds, run, pixels) for name, run in self.opened.items()}


def _seconds(run: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> float:
    start = time.perf_counter()
    run(pixels)
    return time.perf_counter() - start


def _impossible(runtime: str, dtype: str, device: torch.device) -> str | None:
    if runtime != "onnx":
        return None
    if device.type != "cpu":
        return "measured on the CPU only"
    return None if dtype == "fp32" else "its CPU kernels are of fp32"


def _time(
    models: Mapping[str, IsoPruneForImageClassification],
    sessions: _Sessions,
    runtime: str,
    dtype: str,
    batch_size: int,
    settings: BenchmarkSettings,
) -> dict[str, list[float]]:
    turns = {"repeats": settings.repeats, "warmup": _WARMUP, "seconds": settings.seconds}
    if runtime == "onnx":
        return time_calls(sessions.calls(batch_size), **turns)
    precision = "bf16" if dtype == "bf16" else "no"
    size = models["base"].config.image_size
    return time_models(models, size, batch_size=batch_size, precision=precision, backend=runtime, **turns)


def _memory(models: Mapping[str, IsoPruneForImageClassification], dtype: str, batch_size: int) -> dict[str, int]:
    size = models["base"].config.image_size
    precision = "bf16" if dtype == "bf16" else "no"
    return {
        name: peak_memory(model, size, batch_size=batch_size, precision=precision) for name, model in models.items()
    }


def _row(
    runtime: str,
    dtype: str,
    batch_size: int,
    times: Mapping[str, Sequence[float]],
    promised: float,
    memory: dict[str, int] | None,
) -> dict[str, Any]:
    figures = {name: _quartiles(spent) for name, spent in times.items()}
    faster = figures["base"]["median"] / figures["pruned"]["median"]
    row = {"runtime": runtime, "dtype": dtype, "batch_size": batch_size, "turns": len(times["base"]), **figures}
    return row | {"faster": faster, "of_promised": faster / promised, **({"memory": memory} if memory else {})}


def _quartiles(times: Sequence[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": statistics.median(times), "low": low, "high": high}


def _spread(figures: Mapping[str, float]) -> str:
    digits = max(0, 2 - math.floor(math.log10(max(figures["median"], 1e-3))))
    low, median, high = (f"{figures[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def _describe_machine(device: torch.device) -> dict[str, Any]:
    names = ("torch", "onnxruntime")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in names if name == "torch" or _has(name)},
    }


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except ModuleNotFoundError:
        return False


def _cpu_name() -> str:
    """Name the processor: Linux has it in a file, elsewhere only its kind is known."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] not in ("", "unknown") else f"CPU ({platform.machine()})"
