"""PyTorch with images and weights in the layout NHWC, and BatchNorm folded into the convolutions before it."""

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.folding import fold_batchnorm
from isoprune_hf.measuring.images import in_dtype
from isoprune_hf.measuring.runtimes.eager import EagerEngine
from isoprune_hf.measuring.runtimes.engine import OpenModel, Pass, Runtime, torch_pass


class ChannelsLastEngine(EagerEngine):
    """Runs a copy of a module in the layout that convolutions on a CPU compute in."""

    label = "channels_last"

    def open(self, model: IsoPruneForImageClassification, images: torch.Tensor, runtime: Runtime) -> OpenModel:
        """Fold a copy, then change its dtype and layout; images are converted before they are timed."""
        folded, note = fold_batchnorm(model, images)
        moved = in_dtype(folded, runtime.dtype)
        nn.Module.to(moved, memory_format=torch.channels_last)  # transformers wraps its own `to` without types

        def bind(pixels: torch.Tensor) -> Pass:
            prepared = pixels.to(next(moved.parameters())).contiguous(memory_format=torch.channels_last)
            return torch_pass(moved, prepared)

        return OpenModel(bind, note)
