"""Squared per-sample gradients of the parameters of one module, from its input and the gradient at its output.

For a layer the gradient of sample n is a small formula of the two, so one backward pass over a whole micro-batch is
enough; the per-sample gradients of one layer live only until they are squared and added. All sums here are over the
samples of one micro-batch, in float32; `batch` is the number of samples, which lie one behind the other on dim 0.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Largest number of elements that per-sample tensors of one layer may have at a time: a cache, or 256 MB of a device.
_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}

Squares = dict[str, torch.Tensor]


def module_squares(
    module: nn.Module,
    leaves: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gradient: torch.Tensor,
    batch: int,
) -> Squares:
    """Sum the squared per-sample gradients of the parameters that a module owns itself.

    Args:
        module: Called once in the forward pass, in eval mode.
        leaves: Names of its parameters, such as weight.
        args: What it was called with; its first tensor has `batch` times k rows on dim 0.
        kwargs: Its named arguments.
        gradient: Of the loss summed over the samples, at the module's output (the first one of a tuple).
        batch: Number of samples.

    Returns:
        Leaf -> sum over n of g_n^2 in float32, of the shape of the parameter.
    """
    formula = _FORMULAS.get(type(module))
    if formula is None or not args or not _is_plain(module):
        return _squares_by_vjp(module, leaves, args, kwargs, gradient, batch)
    squares = formula(module, args[0].detach(), gradient, batch)
    return {leaf: squares[leaf] for leaf in leaves}


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Give the first tensor that a module was called with."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


def pieces(batch: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Cut the samples so that no piece holds too many elements, of which each sample has `elements`."""
    step = max(1, _ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // max(1, elements))
    return (slice(start, min(start + step, batch)) for start in range(0, batch, step))


def _is_plain(module: nn.Module) -> bool:
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
    """As a linear over unfolded patches; grouped: one convolution that has the groups of all samples."""
    window = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
    height, width = layer.kernel_size
    if layer.groups > 1:
        weight = torch.zeros_like(layer.weight, dtype=torch.float32)
        for piece in pieces(batch, inputs[0].numel(), inputs.device):
            part = inputs[piece]
            samples = len(part)
            per_sample = nn.grad.conv2d_weight(
                part.reshape(1, -1, *part.shape[2:]).to(gradient.dtype),
                (samples * layer.out_channels, *layer.weight.shape[1:]),
                gradient[piece].reshape(1, -1, *gradient.shape[2:]),
                groups=samples * layer.groups,
                **window,
            )
            weight += per_sample.float().unflatten(0, (samples, -1)).square().sum(0)
    else:

        def patches(piece: slice) -> torch.Tensor:
            part = inputs[piece].to(gradient.dtype)
            if (height, width, *layer.padding) == (1, 1, 0, 0):
                part = part[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)
            else:
                part = functional.unfold(part, layer.kernel_size, **window)
            return part.mT

        weight = _outer_squares(gradient.flatten(2), patches, layer.in_channels * height * width)
        weight = weight.view_as(layer.weight)
    return {"weight": weight, "bias": gradient.sum((2, 3), dtype=torch.float32).square().sum(0)}


def _outer_squares(gradient: torch.Tensor, inputs_of: Callable[[slice], torch.Tensor], features: int) -> torch.Tensor:
    """Square the products of (N, O, T) and (N, T, I) and add them over N: (O, I)."""
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


# By the exact type: a subclass may compute something else, as timm's LayerNorm2d, which normalises dim 1.
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
    """Run the module alone once more, under vmap over the samples, and pull the gradient back to its parameters.

    Tensors with as many rows as the first one are cut into samples; others (a mask, a table) are the same for all.
    """
    inputs = {**dict(enumerate(args)), **kwargs}
    rows = len(first_tensor(args, kwargs))
    samples = {
        key: _as_float(value.detach()).unflatten(0, (batch, -1))
        for key, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows
    }
    gradient = _as_float(gradient).unflatten(0, (batch, -1))
    parameters = {leaf: module.get_parameter(leaf).detach() for leaf in leaves}

    def gradients_of(sample: dict[int | str, torch.Tensor], pulled: torch.Tensor) -> Squares:
        given = {**inputs, **sample}
        positional = tuple(given[position] for position in range(len(args)))

        def forward(values: Squares) -> torch.Tensor:
            output = torch.func.functional_call(module, values, positional, {key: given[key] for key in kwargs})
            return output if isinstance(output, torch.Tensor) else output[0]

        return torch.func.vjp(forward, parameters)[1](pulled)[0]

    squares = {leaf: torch.zeros_like(value, dtype=torch.float32) for leaf, value in parameters.items()}
    largest = max(value[0].numel() for value in (*samples.values(), gradient, *parameters.values()))
    for piece in pieces(batch, largest, gradient.device):
        part = {key: value[piece] for key, value in samples.items()}
        for leaf, value in torch.func.vmap(gradients_of)(part, gradient[piece]).items():
            squares[leaf] += value.square().sum(0)
    return squares


def _as_float(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value
