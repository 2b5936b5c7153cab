"""Time the layers of models by hooks: call `time_layers`."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.images import draw_images, in_dtype
from isoprune_hf.measuring.speed import check_counts
from isoprune_hf.recipes.values import DType

LayerMacs = Mapping[str, int]  # layer -> MACs for one image
Variant = tuple[IsoPruneForImageClassification, LayerMacs]
Moment = TypeVar("Moment")
_WARMUP_PASSES = 2


def time_layers(
    variants: Sequence[Variant],
    image_size: Sequence[int],
    *,
    batch_size: int = 1,
    dtype: DType | None = None,
    repeats: int = 20,
) -> list[dict[str, float]]:
    """Measure the layers of each variant in eager mode: layer -> median milliseconds in a pass.

    The time of a layer excludes the modules inside it (attention). The variants are run in turns.

    Raises:
        RecipeError: A number is too small.
    """
    check_counts(batch_size=batch_size, repeats=repeats)
    modes = [(module, module.training) for variant, _ in variants for module in variant.modules()]
    timers: list[_LayerTimer] = []
    passes: list[list[dict[str, float]]] = [[] for _ in variants]
    try:
        for variant, layer_macs in variants:
            variant.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
            copied = in_dtype(variant, dtype)
            present = [name for name, macs in layer_macs.items() if macs > 0]
            timers.append(_LayerTimer(copied, present, draw_images(copied, image_size, batch_size)))
        with torch.inference_mode():
            for turn in range(_WARMUP_PASSES + repeats):
                for timer, timed in zip(timers, passes, strict=True):
                    spent = timer.run()
                    if turn >= _WARMUP_PASSES:
                        timed.append(spent)
    finally:
        for timer in timers:
            timer.detach()
        for module, training in modes:
            module.training = training
    return [{name: statistics.median(spent[name] for spent in timed) for name in timed[0]} for timed in passes]


class _LayerTimer:
    """Times the layers of one model in its forward pass, by hooks."""

    def __init__(self, model: nn.Module, layers: Sequence[str], pixels: torch.Tensor):
        self.model = model
        self.pixels = pixels
        self.clock: _Clock = _CudaClock(pixels.device) if pixels.is_cuda else _CpuClock()
        network = model.get_submodule("model")
        self.children = {
            name: [f"{name}.{child}" for child, _ in network.get_submodule(name).named_children()] for name in layers
        }
        self.hooks: list[RemovableHandle] = []
        for name in dict.fromkeys([*layers, *(child for inner in self.children.values() for child in inner)]):
            module = network.get_submodule(name)
            # First in and last out, so that other hooks count as part of the layer.
            self.hooks.append(module.register_forward_pre_hook(self._mark(name), prepend=True))
            self.hooks.append(module.register_forward_hook(self._mark(name)))

    def _mark(self, name: str) -> Callable[..., None]:
        def mark(module: nn.Module, *values: object) -> None:
            self.clock.mark(name)

        return mark

    def run(self) -> dict[str, float]:
        """Run one pass; return the milliseconds of each layer without the modules inside it."""
        self.clock.restart()
        self.model(self.pixels)
        spent: dict[str, float] = {}
        for name, elapsed in self.clock.intervals():
            spent[name] = spent.get(name, 0.0) + elapsed
        return {
            name: max(spent.get(name, 0.0) - sum(spent.get(child, 0.0) for child in inner), 0.0)
            for name, inner in self.children.items()
        }

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()


class _Clock(Protocol):
    """Marks moments by name; a module is entered at one mark and left at the next of the same name."""

    def restart(self) -> None: ...

    def mark(self, name: str) -> None: ...

    def intervals(self) -> Iterator[tuple[str, float]]: ...


class _CpuClock:
    def __init__(self) -> None:
        self.marks: list[tuple[str, float]] = []

    def restart(self) -> None:
        self.marks.clear()

    def mark(self, name: str) -> None:
        self.marks.append((name, time.perf_counter()))

    def intervals(self) -> Iterator[tuple[str, float]]:
        """Yield name and milliseconds between each pair of marks."""
        for name, start, end in _pair_marks(self.marks):
            yield name, 1000 * (end - start)


class _CudaClock:
    """Events wait in the stream together with the work, so timing does not delay the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, torch.cuda.Event]] = []

    def restart(self) -> None:
        self.marks.clear()

    def mark(self, name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # untyped in torch
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append((name, event))

    def intervals(self) -> Iterator[tuple[str, float]]:
        """Wait for the device, then yield name and milliseconds between each pair of marks."""
        torch.cuda.synchronize(self.device)
        for name, start, end in _pair_marks(self.marks):
            yield name, start.elapsed_time(end)


def _pair_marks(marks: Sequence[tuple[str, Moment]]) -> Iterator[tuple[str, Moment, Moment]]:
    """Yield (name, start, end); a module that is called again yields several times."""
    started: dict[str, Moment] = {}
    for name, moment in marks:
        if name in started:
            yield name, started.pop(name), moment
        else:
            started[name] = moment
