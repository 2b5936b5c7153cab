"""An exported model where a model of PyTorch is expected: `ExportedModel`, and `ExportedOutputs` without classes."""

import math
from collections.abc import Sequence
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


class ExportedOutputs(nn.Module):
    """Returns the outputs of another runtime on the CPU, as the network that was exported does.

    Args:
        run: Function that maps pixels (B, C, H, W) to the outputs side by side, both arrays in fp32.
        shapes: Shape of each output without the dim of the batch.
    """

    def __init__(self, run: Run, shapes: Sequence[Sequence[int]]):
        super().__init__()
        self._run = run
        self._shapes = shapes
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # names the device

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = torch.from_numpy(self._run(pixel_values.float().cpu().contiguous().numpy())).flatten(1)
        parts = torch.split(found, [math.prod(shape) for shape in self._shapes], 1)
        return tuple(part.reshape(len(part), *shape) for part, shape in zip(parts, self._shapes, strict=True))
