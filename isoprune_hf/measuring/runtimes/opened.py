"""Models opened in one runtime, to be timed in turns: `open_models`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.images import draw_images
from isoprune_hf.measuring.runtimes.engine import Engine, OpenModel, Pass, Runtime
from isoprune_hf.measuring.runtimes.registry import ENGINES
from isoprune_hf.measuring.timing import Rounds, Timing, time_calls


@dataclass(frozen=True, eq=False)
class OpenModels:
    """Some models in one runtime."""

    models: Mapping[str, IsoPruneForImageClassification]
    opened: Mapping[str, OpenModel]
    image_size: Sequence[int]
    engine: Engine

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what was not done to the models, one line each."""
        return tuple(f"{name}: {model.note}" for name, model in self.opened.items() if model.note)

    def time(self, batch_size: int, rounds: Rounds, *, beside: "OpenModels | None" = None) -> Timing:
        """Time the models in turns, and with them those of `beside`, which come first."""
        calls = self.passes(batch_size) if beside is None else beside.passes(batch_size) | self.passes(batch_size)
        on_cpu = not any(next(model.parameters()).is_cuda for model in self.models.values())
        return time_calls(calls, rounds.with_warmup(self.engine.min_warmup), on_cpu=on_cpu)

    def passes(self, batch_size: int) -> dict[str, Pass]:
        """Return the call of a pass of each model, by name."""
        return {
            name: self.opened[name].bind(draw_images(model, self.image_size, batch_size))
            for name, model in self.models.items()
        }


@contextmanager
def open_models(
    models: Mapping[str, IsoPruneForImageClassification], image_size: Sequence[int], runtime: Runtime
) -> Iterator[OpenModels]:
    """Open models in a runtime; they are in eval mode within the context, and not changed.

    Args:
        models: Models by name, on their devices.
        image_size: (C, H, W) of one image.
        runtime: Where to run them.

    Raises:
        RuntimeFailedError: The runtime does not work on this machine, or not for these models.
    """
    engine = ENGINES[runtime.name]
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        for model in models.values():
            model.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
        with cpu_threads(runtime.threads), engine.session():
            opened = {
                name: engine.open(model, draw_images(model, image_size, 2), runtime) for name, model in models.items()
            }
            yield OpenModels(models, opened, image_size, engine)
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Set the number of CPU threads of PyTorch to `count` within the context; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
