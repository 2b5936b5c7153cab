"""The value `Runtime`, and the protocol `Engine` that every runtime follows."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes.values import DType, RuntimeName

Pass = Callable[[], object]
Bind = Callable[[torch.Tensor], Pass]


class RuntimeFailedError(RecipeError):
    """Raised when a runtime does not work on this machine, or not for a model.

    Args:
        reason: Why it does not work.
        advice: How to measure without it.
    """

    def __init__(self, reason: str, advice: str):
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


@dataclass(frozen=True)
class Runtime:
    """A way to run a model that is timed; the device is that of the model.

    Args:
        name: Engine that runs the model.
        dtype: Dtype of weights and images; None is the model's own.
        threads: CPU threads; None is PyTorch's number.
    """

    name: RuntimeName = "eager"
    dtype: DType | None = None
    threads: int | None = None


class OpenModel(NamedTuple):
    """A model in a runtime.

    Attributes:
        bind: Converts images (B, C, H, W) once; returns the call of one pass over them, which ends with the result.
        note: What was not done to the model; None if nothing.
    """

    bind: Bind
    note: str | None = None


class Engine(Protocol):
    """A way to run models."""

    @property
    def label(self) -> str:
        """Name in tables and pictures."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that it needs, besides torch."""
        ...

    @property
    def min_warmup(self) -> int:
        """Untimed passes that are needed before the first timed one."""
        ...

    def limitation(self, dtype: DType | None, device: torch.device) -> str | None:
        """Return why models on `device` cannot be timed in `dtype`, or None if they can."""
        ...

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which models are opened and timed.

        Raises:
            RuntimeFailedError: On exit, if the engine failed.
        """
        ...

    def open(self, model: IsoPruneForImageClassification, images: torch.Tensor, runtime: Runtime) -> OpenModel:
        """Open a model.

        Args:
            model: The model in eval mode; it is not changed.
            images: Two images (2, C, H, W) on its device, in its dtype.
            runtime: Dtype and threads.

        Raises:
            RuntimeFailedError: The model does not run in this engine.
        """
        ...


def torch_pass(model: nn.Module, images: torch.Tensor) -> Pass:
    """Return the call of a pass of PyTorch, which waits for the device."""

    def run() -> object:
        with torch.inference_mode():
            output: object = model(images)
        synchronize(images.device)
        return output

    return run


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
