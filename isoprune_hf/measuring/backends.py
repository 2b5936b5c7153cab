"""Backends of PyTorch that a model can be timed with.

`BACKENDS` maps each name in `Backend` to a `TimedBackend`; `speed.time_models` looks a backend up by its name.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import nn

from isoprune_hf.errors import RecipeError

Backend = Literal["eager", "compile"]
Forward = Callable[[torch.Tensor], Any]
_MAX_CAUSE_LENGTH = 200  # characters of a compiler's message


class BackendError(RecipeError):
    """Raised when a backend does not work on this machine.

    Args:
        reason: Why it does not work.
        advice: How to measure without it.
    """

    def __init__(self, reason: str, advice: str):
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


class TimedBackend(Protocol):
    """A way to run a module."""

    @property
    def min_warmup(self) -> int:
        """Untimed passes that are needed before the first timed one."""
        ...

    def prepare(self, model: nn.Module) -> Forward:
        """Return the callable to time."""
        ...

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which models are prepared and timed.

        Raises:
            BackendError: On exit, if the backend failed.
        """
        ...


class EagerBackend:
    """Run a module as it is."""

    min_warmup = 0

    def prepare(self, model: nn.Module) -> Forward:
        """Return the module itself."""
        return model

    @contextmanager
    def session(self) -> Iterator[None]:
        """Do nothing: errors of the model keep their type."""
        yield


class CompileBackend:
    """Run a module compiled by `torch.compile` for one input shape."""

    min_warmup = 1  # the first pass compiles

    def prepare(self, model: nn.Module) -> Forward:
        """Return the compiled module; it is compiled when it is first called."""
        return torch.compile(model, dynamic=False)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Empty the compiler's cache first: its few entries are shared by all models of the process."""
        torch.compiler.reset()
        try:
            yield
        except RuntimeError as error:  # the base class of torch._dynamo's errors, whose import takes seconds
            cause = " ".join(str(error).split())[:_MAX_CAUSE_LENGTH]
            raise BackendError(
                f"torch.compile does not work here ({cause})", "measure with latency_backend eager"
            ) from error


BACKENDS: Mapping[Backend, TimedBackend] = {"eager": EagerBackend(), "compile": CompileBackend()}
