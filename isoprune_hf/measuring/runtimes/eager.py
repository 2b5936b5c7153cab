"""PyTorch as it is, and PyTorch compiled by `torch.compile`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.images import in_dtype
from isoprune_hf.measuring.runtimes.engine import OpenModel, Runtime, RuntimeFailedError, torch_pass
from isoprune_hf.recipes.values import DType

_MAX_CAUSE_LENGTH = 200  # characters of a compiler's message


class EagerEngine:
    """Runs a module as it is."""

    label = "eager"
    packages = ()
    min_warmup = 0

    def limitation(self, dtype: DType | None, device: torch.device) -> str | None:
        """Return None: PyTorch times every dtype on every device."""
        return None

    def session(self) -> AbstractContextManager[None]:
        """Return an empty context: errors of the model keep their type."""
        return nullcontext()

    def open(self, model: IsoPruneForImageClassification, images: torch.Tensor, runtime: Runtime) -> OpenModel:
        """Return the module itself, or a copy of it in another dtype."""
        cast = in_dtype(model, runtime.dtype)
        return OpenModel(lambda pixels: torch_pass(cast, pixels.to(next(cast.parameters()))))


class CompileEngine:
    """Runs a module compiled by `torch.compile` for one input shape."""

    label = "torch.compile"
    packages = ()
    min_warmup = 1  # the first pass compiles

    def limitation(self, dtype: DType | None, device: torch.device) -> str | None:
        """Return None: whether a compiler works is seen at the first pass."""
        return None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Empty the compiler's cache first: its few entries are shared by all models of the process."""
        torch.compiler.reset()
        try:
            yield
        except RuntimeError as error:  # the base class of torch._dynamo's errors, whose import takes seconds
            cause = " ".join(str(error).split())[:_MAX_CAUSE_LENGTH]
            raise RuntimeFailedError(
                f"torch.compile does not work here ({cause})", "measure in the runtime eager"
            ) from error

    def open(self, model: IsoPruneForImageClassification, images: torch.Tensor, runtime: Runtime) -> OpenModel:
        """Return the compiled module; it is compiled when it is first called."""
        cast = in_dtype(model, runtime.dtype)
        compiled: nn.Module = torch.compile(cast, dynamic=False)  # type: ignore[assignment]  # typed as a function
        return OpenModel(lambda pixels: torch_pass(compiled, pixels.to(next(cast.parameters()))))
