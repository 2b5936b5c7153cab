"""How long a plan's model would take: a time for each layer, fitted from a few measured models."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.speed import (
    Backend,
    Precision,
    check_counts,
    draw_images,
    measure_latency,
    record_measurement,
    with_precision,
)

Macs = Mapping[str, int]
_WARMUP = 2


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Time of a forward pass as a function of the MACs of every layer; it never falls when a layer grows.

    Args:
        fixed: Milliseconds that no plan changes.
        layers: Layer -> (milliseconds it takes while it is there, milliseconds for each of its MACs).
        record: What was measured, on what: plain values.
    """

    fixed: float
    layers: Mapping[str, tuple[float, float]]
    record: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, layer_macs: Macs) -> float:
        """Predict the milliseconds of one batch.

        Args:
            layer_macs: Layer -> MACs for one image; a layer without MACs is not there.
        """
        total = self.fixed
        for name, macs in layer_macs.items():
            if macs > 0:
                constant, slope = self.layers[name]
                total += constant + slope * macs
        return total


def fit_latency(
    model: IsoPruneForImageClassification,
    variants: Sequence[tuple[IsoPruneForImageClassification, Macs]],
    *,
    batch_size: int = 1,
    precision: Precision = "no",
    backend: Backend = "eager",
    repeats: int = 20,
) -> LatencyModel:
    """Measure some cuts of a model and fit a time to each of its layers.

    Args:
        model: The dense base: its image size and its device are those of the measurement.
        variants: Models of different widths, the base among them, each with its MACs by layer. Layers are modules of
            `model.model` that compute; an attention module stands for its two products.
        batch_size: Images in the batch.
        precision: no or bf16, as in `measure_latency`.
        backend: eager or compile. Compiled layers cannot be told apart: their shares are measured in eager mode, the
            whole model as it is compiled.
        repeats: Timed passes of each variant, of its layers and again of the whole.

    Raises:
        RecipeError: See `measure_latency`.
    """
    settings = {"batch_size": batch_size, "precision": precision}
    macs = [layer_macs for _, layer_macs in variants]
    names = {str(number): variant for number, (variant, _) in enumerate(variants)}
    layer_times = time_layers(variants, model.config.image_size, repeats=repeats, **settings)
    totals = measure_latency(names, model.config.image_size, backend=backend, repeats=repeats, **settings)
    record = record_measurement(model.device, backend=backend, repeats=repeats, **settings)
    return fit_times(macs, layer_times, list(totals.values()), record)


def fit_times(
    macs: Sequence[Macs],
    layer_times: Sequence[Mapping[str, float]],
    totals: Sequence[float],
    record: Mapping[str, Any] | None = None,
) -> LatencyModel:
    """Fit the times of layers, then scale them so that their sums meet the times of the whole models.

    Args:
        macs: For each variant: layer -> MACs.
        layer_times: For each variant: layer -> milliseconds.
        totals: For each variant: milliseconds of the whole model.
        record: What was measured.
    """
    lines = {}
    for name in dict.fromkeys(name for variant in macs for name in variant):
        alive = [number for number, variant in enumerate(macs) if variant.get(name, 0) > 0]
        sizes, times = [macs[number][name] for number in alive], [layer_times[number][name] for number in alive]
        lines[name] = _fit_line(sizes, times) if alive else (0.0, 0.0)
    unscaled = LatencyModel(0.0, lines)
    # Norms, activations and sums grow with the layers beside them: the factor is their share.
    fixed, factor = _fit_line([unscaled.predict(variant) for variant in macs], totals, is_factor=True)
    scaled = {name: (factor * constant, factor * slope) for name, (constant, slope) in lines.items()}
    return LatencyModel(fixed, scaled, dict(record or {}))


def _fit_line(sizes: Sequence[float], times: Sequence[float], *, is_factor: bool = False) -> tuple[float, float]:
    """Fit constant and slope, neither below zero, in least squares.

    Where all sizes are equal nothing tells constant and slope apart: the slope takes all of it; a factor takes 1.
    """
    size, spent = np.asarray(sizes, dtype=np.float64), np.asarray(times, dtype=np.float64)
    spread = size - size.mean()
    through_zero = float(size @ spent / (size @ size)) if size.any() else 0.0
    if not np.ptp(size) > 0:
        rest = float(spent.mean() - size.mean())
        return (rest, 1.0) if is_factor and rest >= 0 else (0.0, max(through_zero, 0.0))
    slope = float(spread @ spent / (spread @ spread))
    constant = float(spent.mean() - slope * size.mean())
    # With one bound active, the best value of the other lies on that bound.
    if slope < 0:
        return max(float(spent.mean()), 0.0), 0.0
    return (constant, slope) if constant >= 0 else (0.0, max(through_zero, 0.0))


def time_layers(
    variants: Sequence[tuple[IsoPruneForImageClassification, Macs]],
    image_size: Sequence[int],
    *,
    batch_size: int = 1,
    precision: Precision = "no",
    repeats: int = 20,
) -> list[dict[str, float]]:
    """Measure the layers of each variant in eager mode: layer -> median milliseconds in a pass.

    A layer with modules inside (attention) counts without them. The variants take turns.

    Raises:
        RecipeError: A number is too small.
    """
    check_counts(batch_size=batch_size, repeats=repeats)
    modes = [(module, module.training) for variant, _ in variants for module in variant.modules()]
    stopwatches: list[_Stopwatch] = []
    passes: list[list[dict[str, float]]] = [[] for _ in variants]
    try:
        for variant, layer_macs in variants:
            variant.eval()
            copied = with_precision(variant, precision)
            alive = [name for name, macs in layer_macs.items() if macs > 0]
            stopwatches.append(_Stopwatch(copied, alive, draw_images(copied, image_size, batch_size)))
        with torch.inference_mode():
            for turn in range(_WARMUP + repeats):
                for stopwatch, timed in zip(stopwatches, passes, strict=True):
                    spent = stopwatch.run()
                    if turn >= _WARMUP:
                        timed.append(spent)
    finally:
        for stopwatch in stopwatches:
            stopwatch.detach()
        for module, training in modes:
            module.training = training
    return [{name: statistics.median(spent[name] for spent in timed) for name in timed[0]} for timed in passes]


class _Stopwatch:
    """Times the layers of one model in its forward pass, by hooks."""

    def __init__(self, model: IsoPruneForImageClassification, layers: Sequence[str], pixels: torch.Tensor):
        self.model, self.pixels = model, pixels
        self.children = {
            name: [f"{name}.{child}" for child, _ in model.model.get_submodule(name).named_children()]
            for name in layers
        }
        self.marks: list[tuple[str, Any]] = []
        self.hooks = []
        for name in dict.fromkeys([*layers, *(child for inner in self.children.values() for child in inner)]):
            module = model.model.get_submodule(name)
            # First in and last out, so that hooks of others count as part of the layer.
            self.hooks.append(module.register_forward_pre_hook(self._mark(name), prepend=True))
            self.hooks.append(module.register_forward_hook(self._mark(name)))

    def _mark(self, name: str) -> Any:
        def mark(module: nn.Module, *values: Any) -> None:
            if self.pixels.is_cuda:
                # Events wait in the stream with the work, so timing does not hold the device up.
                moment = torch.cuda.Event(enable_timing=True)
                moment.record(torch.cuda.current_stream(self.pixels.device))
            else:
                moment = time.perf_counter()
            self.marks.append((name, moment))

        return mark

    def run(self) -> dict[str, float]:
        """Run one pass; returns the milliseconds of each layer without what lies inside it."""
        self.marks.clear()
        self.model(self.pixels)
        if self.pixels.is_cuda:
            torch.cuda.synchronize(self.pixels.device)
        spent: dict[str, float] = {}
        started: dict[str, list[Any]] = {}
        for name, moment in self.marks:
            # A layer that was entered is left by its next mark; one that is called again adds to its time.
            if started.get(name):
                start = started[name].pop()
                elapsed = start.elapsed_time(moment) if self.pixels.is_cuda else 1000 * (moment - start)
                spent[name] = spent.get(name, 0.0) + elapsed
            else:
                started[name] = [moment]
        return {
            name: max(spent.get(name, 0.0) - sum(spent.get(child, 0.0) for child in inner), 0.0)
            for name, inner in self.children.items()
        }

    def detach(self) -> None:
        """Take the hooks off again."""
        for hook in self.hooks:
            hook.remove()
