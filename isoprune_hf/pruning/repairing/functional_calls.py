"""Observe the calls of `linear` and `conv2d` with the weight of a layer (`FunctionalProbe`).

A layer is fitted to the tensor that the function reads, not to the input of its module: a module may change its input
first, as one that pads it does. The output of the function is the output of the layer only if the module returns it
as it is.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Sizes = int | Sequence[int]


class Window(NamedTuple):
    """The settings of a 2d convolution.

    Args:
        kernel: Height and width.
        stride: Down and right.
        padding: Zeros left, right, above and below, in the order of `torch.nn.functional.pad`.
        dilation: Down and right.
        groups: Number of groups.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view of the inputs from which each output of each group is computed.

        Args:
            x: Input of the convolution (B, C, H, W).

        Returns:
            (G, B, rows, columns, C / G, kernel height, kernel width).
        """
        patches = functional.pad(x, self.padding)
        settings = zip(self.kernel, self.stride, self.dilation, strict=True)
        for dim, (size, stride, dilation) in enumerate(settings, start=2):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return torch.unflatten(patches, 1, (self.groups, -1)).permute(1, 0, 3, 4, 2, 5, 6)


class FunctionalCall(NamedTuple):
    """One call of `linear` or `conv2d`.

    Args:
        inputs: The tensor that the function read.
        weight: The weight.
        bias: The bias that it added.
        output: Its output.
        window: The settings of a convolution; None for `linear`.
    """

    inputs: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    output: torch.Tensor
    window: Window | None


class FunctionalProbe(TorchFunctionMode):
    """Records, within its context, the last call of `linear` or `conv2d` with the weight of each of some modules.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self._weights = {id(weight) for module in modules for weight in module.parameters(recurse=False)}
        self._calls: dict[int, FunctionalCall] = {}

    def call_of(self, module: nn.Module, output: torch.Tensor) -> FunctionalCall | None:
        """Return the call that computed the output of a module from its own weight and bias, or None."""
        parameters = dict(module.named_parameters(recurse=False))
        call = self._calls.get(id(parameters.get("weight")))
        is_own = call is not None and call.output is output and call.bias is parameters.get("bias")
        return call if is_own else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        call = _READERS[func](result, *args, **kwargs) if func in _READERS else None
        if call is not None and id(call.weight) in self._weights:
            self._calls[id(call.weight)] = call
        return result


def _read_linear(
    output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> FunctionalCall:
    """Return a call of `linear`; the names of the arguments are those of torch."""
    return FunctionalCall(input, weight, bias, output, None)


def _read_conv2d(
    output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: _Sizes = 1,
    padding: str | _Sizes = 0,
    dilation: _Sizes = 1,
    groups: int = 1,
) -> FunctionalCall:
    """Return a call of `conv2d`; the names of the arguments are those of torch."""
    kernel = _pair(weight.shape[2:])
    steps = _pair(dilation)
    if padding == "same":  # an odd number of zeros has one more on the right, and below
        total = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
        before = [number // 2 for number in total]
        sides = (before[1], total[1] - before[1], before[0], total[0] - before[0])
    else:
        down, right = (0, 0) if isinstance(padding, str) else _pair(padding)
        sides = (right, right, down, down)
    return FunctionalCall(input, weight, bias, output, Window(kernel, _pair(stride), sides, steps, groups))


def _pair(sizes: _Sizes) -> tuple[int, int]:
    """Return two numbers; torch takes one number, alone or in a sequence, for both."""
    numbers = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return numbers[0], numbers[-1]


_READERS: dict[Callable[..., Any], Callable[..., FunctionalCall]] = {
    functional.linear: _read_linear,
    functional.conv2d: _read_conv2d,
}
