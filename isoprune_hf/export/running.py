"""An exported model where a model of PyTorch is expected: `ExportedModel`."""

from types import SimpleNamespace

import torch
from torch import nn

from isoprune_hf.measuring.runtimes.onnx_runtime import Run


class ExportedModel(nn.Module):
    """Returns `.logits` of another runtime on the CPU.

    Args:
        run: Function that maps pixels (B, C, H, W) to logits (B, classes), both arrays in fp32.
    """

    def __init__(self, run: Run):
        super().__init__()
        self._run = run

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        pixels = pixel_values.float().cpu().contiguous().numpy()
        return SimpleNamespace(logits=torch.from_numpy(self._run(pixels)))
