"""Squared per-sample gradients of the parameters of one module, from its input and the gradient at its output.

`module_squares` computes them. The gradient of sample n by a layer's parameters is a small formula of the two, so one
backward pass over a whole micro-batch is enough; the per-sample gradients of a layer exist only until they are squared
and added. All sums are over the samples of one micro-batch, in float32; `batch` is the number of samples, which lie
one after the other on dim 0.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from isoprune_hf.pruning.calibration.inputs import read_tensor
from isoprune_hf.pruning.calibration.replacing import replaced_parameters

# Largest number of elements of the per-sample tensors of one layer at a time: the size of a cache, or 256 MB of a GPU.
_MAX_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}

Squares = dict[str, torch.Tensor]


def module_squares(
    module: nn.Module,
    leaves: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gradient: torch.Tensor,
    batch: int,
) -> Squares:
    """Compute the sum of the squared per-sample gradients of the parameters that a module itself owns.

    Args:
        module: Called once in the forward pass, in eval mode.
        leaves: Names of its parameters, such as weight.
        args: Its positional arguments; the first tensor among its arguments has `batch` times k rows on dim 0.
        kwargs: Its named arguments.
        gradient: Gradient of the loss, summed over the samples, at the module's output (the first one of a tuple).
        batch: Number of samples.

    Returns:
        Leaf -> sum over n of g_n^2 in float32, of the shape of the parameter.

    Raises:
        RuntimeError: The module has no formula, and `torch.func` cannot run it.
    """
    formula = _FORMULAS.get(type(module))
    if formula is None or not args or not _has_formula(module):
        return _squares_by_vjp(module, leaves, args, kwargs, gradient, batch)
    squares = formula(module, args[0].detach(), gradient, batch)
    return {leaf: squares[leaf] for leaf in leaves}


def pieces(batch: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Split the samples into pieces of at most `_MAX_ELEMENTS` elements, of which each sample has `elements`."""
    step = max(1, _MAX_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // max(1, elements))
    return (slice(start, min(start + step, batch)) for start in range(0, batch, step))


def _has_formula(module: nn.Module) -> bool:
    """Check whether the formula of a module's type holds for its settings."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return not isinstance(module, nn.BatchNorm2d) or module.running_mean is not None


def _linear(layer: nn.Linear, inputs: torch.Tensor, gradient: torch.Tensor, batch: int) -> Squares:
    """g_n = sum over tokens of delta_nt x_nt^T; with a single token its square is delta_n^2 (x_n^2)^T."""
    inputs = inputs.reshape(batch, -1, inputs.shape[-1])
    gradient = gradient.reshape(batch, -1, gradient.shape[-1])
    if inputs.shape[1] == 1:
        weight = gradient[:, 0].float().square().T @ inputs[:, 0].float().square()
    else:
        weight = _outer_squares(gradient.mT, lambda piece: inputs[piece].to(gradient.dtype), layer.in_features)
    return {"weight": weight, "bias": gradient.sum(1, dtype=torch.float32).square().sum(0)}


def _conv(layer: nn.Conv2d, inputs: torch.Tensor, gradient: torch.Tensor, batch: int) -> Squares:
    weight = (
        _grouped_conv_weight(layer, inputs, gradient, batch)
        if layer.groups > 1
        else _conv_weight(layer, inputs, gradient)
    )
    return {"weight": weight, "bias": gradient.sum((2, 3), dtype=torch.float32).square().sum(0)}


def _conv_weight(layer: nn.Conv2d, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Compute the squares of a weight without groups as those of a linear over unfolded patches."""
    height, width = layer.kernel_size

    def patches(piece: slice) -> torch.Tensor:
        part = inputs[piece].to(gradient.dtype)
        if (height, width, *layer.padding) == (1, 1, 0, 0):
            part = part[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)
        else:
            part = functional.unfold(part, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
        return part.mT

    weight = _outer_squares(gradient.flatten(2), patches, layer.in_channels * height * width)
    return weight.view_as(layer.weight)


def _grouped_conv_weight(layer: nn.Conv2d, inputs: torch.Tensor, gradient: torch.Tensor, batch: int) -> torch.Tensor:
    """Compute the squares of a weight with groups by one convolution that has the groups of all samples."""
    weight = torch.zeros_like(layer.weight, dtype=torch.float32)
    for piece in pieces(batch, inputs[0].numel(), inputs.device):
        part = inputs[piece]
        samples = len(part)
        per_sample: torch.Tensor = conv2d_weight(  # type: ignore[no-untyped-call]  # torch does not annotate it
            part.reshape(1, -1, *part.shape[2:]).to(gradient.dtype),
            (samples * layer.out_channels, *layer.weight.shape[1:]),
            gradient[piece].reshape(1, -1, *gradient.shape[2:]),
            stride=layer.stride,
            padding=_padding(layer),
            dilation=layer.dilation,
            groups=samples * layer.groups,
        )
        weight += torch.unflatten(per_sample.float(), 0, (samples, -1)).square().sum(0)
    return weight


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Return the padding of a convolution, which `_has_formula` has found to be no name such as `same`."""
    return tuple(int(size) for size in layer.padding)


def _outer_squares(gradient: torch.Tensor, inputs_of: Callable[[slice], torch.Tensor], features: int) -> torch.Tensor:
    """Return the squares of the matrix products of (N, O, T) and (N, T, I), summed over N: (O, I)."""
    batch, outputs, tokens = gradient.shape
    total = torch.zeros(outputs, features, device=gradient.device)
    for piece in pieces(batch, features * max(outputs, tokens), gradient.device):
        products = torch.bmm(gradient[piece], inputs_of(piece)).float()
        if len(products) == 1:
            total.addcmul_(products[0], products[0])
        else:
            total += products.square_().sum(0)
    return total


def _batch_norm(norm: nn.BatchNorm2d, inputs: torch.Tensor, gradient: torch.Tensor, batch: int) -> Squares:
    if norm.running_mean is None or norm.running_var is None:
        raise RuntimeError("the BatchNorm has no running statistics")
    scale = (norm.running_var + norm.eps).rsqrt()
    centred = inputs.float() - norm.running_mean[:, None, None]
    weight = (gradient * centred).sum((2, 3)) * scale
    return {"weight": weight.square().sum(0), "bias": gradient.sum((2, 3), dtype=torch.float32).square().sum(0)}


def _group_norm(norm: nn.GroupNorm, inputs: torch.Tensor, gradient: torch.Tensor, batch: int) -> Squares:
    normalized = functional.group_norm(inputs.float(), norm.num_groups, eps=norm.eps)
    rest = list(range(2, inputs.ndim))
    weight = (gradient * normalized).sum(rest) if rest else gradient * normalized
    bias = gradient.sum(rest, dtype=torch.float32) if rest else gradient.float()
    return {"weight": weight.square().sum(0), "bias": bias.square().sum(0)}


def _layer_norm(norm: nn.LayerNorm, inputs: torch.Tensor, gradient: torch.Tensor, batch: int) -> Squares:
    normalized = functional.layer_norm(inputs.float(), norm.normalized_shape, eps=norm.eps)
    shape = (batch, -1, *norm.normalized_shape)
    weight = (gradient * normalized).reshape(shape).sum(1)
    bias = gradient.reshape(shape).sum(1, dtype=torch.float32)
    return {"weight": weight.square().sum(0), "bias": bias.square().sum(0)}


# Looked up by the exact type: a subclass may compute something else, as timm's LayerNorm2d, which normalises dim 1.
_FORMULAS: dict[type[nn.Module], Callable[[Any, torch.Tensor, torch.Tensor, int], Squares]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}


def _squares_by_vjp(
    module: nn.Module,
    leaves: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gradient: torch.Tensor,
    batch: int,
) -> Squares:
    """Run the module on its own again, under vmap over the samples, and pull the gradient back to its parameters.

    Tensors with as many rows as the first one are split into samples; others (a mask, a table) are the same for all.

    Raises:
        RuntimeError: `torch.func` cannot run the module, or it was called without a tensor.
    """
    inputs: dict[int | str, Any] = dict(enumerate(args))
    inputs.update(kwargs)
    rows = len(read_tensor(args, kwargs))
    samples = {
        key: torch.unflatten(_as_float(value.detach()), 0, (batch, -1))
        for key, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows
    }
    gradient = torch.unflatten(_as_float(gradient), 0, (batch, -1))
    parameters = {leaf: module.get_parameter(leaf).detach() for leaf in leaves}

    def gradients_of(sample: dict[int | str, torch.Tensor], pulled: torch.Tensor) -> Squares:
        given = {**inputs, **sample}
        positional = tuple(given[position] for position in range(len(args)))

        def forward(values: Squares) -> torch.Tensor:
            with replaced_parameters(module, values):
                output = module(*positional, **{key: given[key] for key in kwargs})
            result: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
            return result

        gradients: Squares = torch.func.vjp(forward, parameters)[1](pulled)[0]
        return gradients

    squares = {leaf: torch.zeros_like(value, dtype=torch.float32) for leaf, value in parameters.items()}
    largest = max(value[0].numel() for value in (*samples.values(), gradient, *parameters.values()))
    for piece in pieces(batch, largest, gradient.device):
        part = {key: value[piece] for key, value in samples.items()}
        for leaf, value in torch.func.vmap(gradients_of)(part, gradient[piece]).items():
            squares[leaf] += value.square().sum(0)
    return squares


def _as_float(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value
