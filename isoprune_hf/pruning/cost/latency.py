"""Predict the latency of any cut from a time per layer, fitted on a few measured models: call `fit_latency`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.measuring.speed import record_measurement
from isoprune_hf.pruning.cost.layer_times import LayerMacs, Variant
from isoprune_hf.pruning.cost.macs import CostModel, RemovedUnits
from isoprune_hf.pruning.cost.runtime_times import time_in_runtime

FITTED_PASSES = 20  # timed passes of each variant by default
_WHOLE_BASE = RemovedUnits({}, {}, ())
# Kernels count as computing in blocks of channels if that leaves at most this share of the squared misfit: noise
# decides between multiples that fit about as well.
_MAX_MISFIT = 0.8


@dataclass(frozen=True)
class LatencySettings:
    """Conditions under which a model is timed.

    Args:
        batch_size: Images in the batch.
        runtime: Where it runs.
    """

    batch_size: int = 1
    runtime: Runtime = Runtime()  # noqa: RUF009 a frozen value


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Time of a forward pass as a non-decreasing function of the MACs of every layer.

    Args:
        fixed: Milliseconds that do not depend on any layer.
        layers: Layer -> (milliseconds if it has any MACs, milliseconds per MAC).
        record: Device and settings of the measurement, as plain values.
        multiple: A width takes as long as the next multiple of this number.
    """

    fixed: float
    layers: Mapping[str, tuple[float, float]]
    record: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1

    def predict_cut(self, cost: CostModel, removed: RemovedUnits = _WHOLE_BASE) -> float:
        """Predict the milliseconds of one batch after a cut, by default of the base."""
        return self.predict(cost.layer_macs(*removed, multiple=self.multiple))

    def predict(self, layer_macs: LayerMacs) -> float:
        """Predict the milliseconds of one batch.

        Args:
            layer_macs: Layer -> MACs for one image, of widths in multiples of `multiple`; a removed layer has none.
        """
        total = self.fixed
        for name, macs in layer_macs.items():
            if macs > 0:
                constant, slope = self.layers[name]
                total += constant + slope * macs
        return total


def fit_latency(
    model: IsoPruneForImageClassification,
    variants: Sequence[Variant],
    settings: LatencySettings,
    *,
    fitted: int | None = None,
    blocked: Mapping[int, Sequence[LayerMacs]] | None = None,
    repeats: int = FITTED_PASSES,
) -> LatencyModel:
    """Measure some cuts of a model and fit a time to each of its layers.

    Args:
        model: The dense base; its image size and device are those of the measurement.
        variants: Models of different widths, including the base, each with its MACs by layer. Layers are the modules
            of `model.model` that compute; the entry of an attention module is that of its two products.
        settings: Conditions of the measurement; see `time_in_runtime`.
        fitted: The times are fitted to so many variants, by default to all; the others only choose the multiple.
        blocked: Multiple -> MACs by layer of each variant, with its widths rounded up to the multiple. The MACs of the
            multiple that explains the times of all variants best are taken.
        repeats: Timed passes of each variant: of its layers, and again of the whole model.

    Raises:
        RecipeError: See `measure_latency`.
    """
    image_size = image_size_of(model)
    times = time_in_runtime(
        variants, image_size, batch_size=settings.batch_size, runtime=settings.runtime, repeats=repeats
    )
    record = record_measurement(model.device, settings.runtime, batch_size=settings.batch_size, repeats=repeats)
    layer_times = [variant.layers for variant in times]
    macs = {1: [layer_macs for _, layer_macs in variants], **(blocked or {})}
    multiple = find_multiple(macs, layer_times, fitted)
    totals = [variant.total for variant in times]
    latency = fit_times(macs[multiple][:fitted], layer_times[:fitted], totals[:fitted], record)
    return replace(latency, multiple=multiple)


def find_multiple(
    macs: Mapping[int, Sequence[LayerMacs]], layer_times: Sequence[Mapping[str, float]], fitted: int | None = None
) -> int:
    """Return the number of channels that kernels compute together: the multiple whose MACs explain the times best.

    Args:
        macs: Multiple -> MACs by layer of each variant, with its widths rounded up to the multiple; 1 is among them.
        layer_times: For each variant: layer -> milliseconds.
        fitted: A time is fitted to so many variants, by default to all; the misfit is that of all.
    """
    misfits = {
        multiple: _misfit(_fit_lines(variants[:fitted], layer_times[:fitted]), variants, layer_times)
        for multiple, variants in macs.items()
    }
    best = min(misfits, key=lambda multiple: (misfits[multiple], multiple))
    return best if misfits[best] < _MAX_MISFIT * misfits[1] else 1


def _misfit(
    lines: Mapping[str, tuple[float, float]], macs: Sequence[LayerMacs], layer_times: Sequence[Mapping[str, float]]
) -> float:
    """Return the sum of the squared residuals of all layers, each as a share of the layer's longest time."""
    total = 0.0
    for name, (constant, slope) in lines.items():
        variants = zip(macs, layer_times, strict=True)
        pairs = [(variant[name], times[name]) for variant, times in variants if variant.get(name)]
        longest = max((spent for _, spent in pairs), default=0.0)
        if longest > 0:
            total += sum(((constant + slope * size - spent) / longest) ** 2 for size, spent in pairs)
    return total


def fit_times(
    macs: Sequence[LayerMacs],
    layer_times: Sequence[Mapping[str, float]],
    totals: Sequence[float],
    record: Mapping[str, Any] | None = None,
) -> LatencyModel:
    """Fit a time to each layer, then scale the times so that their sums fit the times of the whole models.

    Args:
        macs: For each variant: layer -> MACs.
        layer_times: For each variant: layer -> milliseconds.
        totals: For each variant: milliseconds of the whole model.
        record: Device and settings of the measurement.
    """
    lines = _fit_lines(macs, layer_times)
    unscaled = LatencyModel(0.0, lines)
    # Norms, activations and sums have no line of their own and grow with the layers: the factor accounts for them.
    fixed, factor = _fit_line([unscaled.predict(variant) for variant in macs], totals, is_factor=True)
    scaled = {name: (factor * constant, factor * slope) for name, (constant, slope) in lines.items()}
    return LatencyModel(fixed, scaled, dict(record or {}))


def _fit_lines(
    macs: Sequence[LayerMacs], layer_times: Sequence[Mapping[str, float]]
) -> dict[str, tuple[float, float]]:
    """Fit constant and slope of each layer to the variants that have it."""
    lines: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(name for variant in macs for name in variant):
        present = [number for number, variant in enumerate(macs) if variant.get(name, 0) > 0]
        sizes = [macs[number][name] for number in present]
        times = [layer_times[number][name] for number in present]
        lines[name] = _fit_line(sizes, times) if present else (0.0, 0.0)
    return lines


def _fit_line(sizes: Sequence[float], times: Sequence[float], *, is_factor: bool = False) -> tuple[float, float]:
    """Fit a non-negative constant and a non-negative slope by least squares.

    If all sizes are equal, constant and slope cannot be separated: the slope then explains all of the time, and with
    `is_factor` it is 1.
    """
    size = np.asarray(sizes, dtype=np.float64)
    spent = np.asarray(times, dtype=np.float64)
    spread = size - size.mean()
    through_zero = float(size @ spent / (size @ size)) if size.any() else 0.0
    if not np.ptp(size) > 0:
        rest = float(spent.mean() - size.mean())
        return (rest, 1.0) if is_factor and rest >= 0 else (0.0, max(through_zero, 0.0))
    slope = float(spread @ spent / (spread @ spread))
    constant = float(spent.mean() - slope * size.mean())
    # If one bound is active, the optimum of the other variable lies on that bound.
    if slope < 0:
        return max(float(spent.mean()), 0.0), 0.0
    return (constant, slope) if constant >= 0 else (0.0, max(through_zero, 0.0))
