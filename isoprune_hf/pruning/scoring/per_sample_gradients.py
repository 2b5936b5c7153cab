"""Three ways to compute the squared per-sample gradients of one micro-batch: by layers, by vmap, image by image.

Every function returns the sum over the B images, g_1^2 + ... + g_B^2 in float32, and expects the model in
`scoring_mode` without gradients. A parameter that the loss does not depend on is omitted or zero. `fisher.choose_ways`
chooses between them.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.gradients import loss_gradients, summed_loss
from isoprune_hf.pruning.calibration.inputs import first_tensor
from isoprune_hf.pruning.calibration.replacing import replaced_parameters
from isoprune_hf.pruning.scoring.layer_squares import Squares, module_squares, pieces
from isoprune_hf.recipes.values import Precision


def streamed_squares(
    model: IsoPruneForImageClassification,
    layers: Mapping[str, tuple[str, ...]],
    expanded: Collection[str],
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision = "no",
    *,
    is_probe: bool = False,
) -> Squares:
    """Run one forward and one backward pass, during which every layer computes its squares.

    Args:
        model: Its `model` owns the parameters.
        layers: Module -> leaves of the parameters computed from the module's input and output gradient.
        expanded: Parameters of shape (1, ...) that the forward pass accepts as (B, ...).
        images: (B, C, H, W).
        labels: (B,).
        precision: Precision of the two passes.
        is_probe: Omit a module whose squares cannot be computed instead of raising.

    Raises:
        RuntimeError: The model does not accept an expanded parameter, or, unless `is_probe`, the squares of a module
            cannot be computed.
    """
    batch = len(images)
    copies = {
        name: model.model.get_parameter(name).detach().repeat_interleave(batch, 0).requires_grad_()
        for name in expanded
    }
    with (
        _LayerHooks(model.model, layers, batch, is_probe=is_probe) as hooks,
        replaced_parameters(model.model, copies),
    ):
        loss = summed_loss(model, images, labels, precision)
        if loss.requires_grad:
            torch.autograd.backward(loss)
    tokens = {name: copy.grad.square().sum(0, keepdim=True) for name, copy in copies.items() if copy.grad is not None}
    return hooks.squares | tokens


def vmapped_squares(
    model: IsoPruneForImageClassification,
    names: Collection[str],
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision = "no",
) -> Squares:
    """Compute the gradients of several images at a time by `torch.func.vmap` over the whole model.

    Raises:
        RuntimeError: `torch.func` cannot run the model.
    """
    parameters = {name: model.model.get_parameter(name).detach() for name in names}

    def loss(values: Squares, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        with replaced_parameters(model.model, values):
            return summed_loss(model, image[None], label[None], precision)

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    squares = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
    elements = sum(value.numel() for value in parameters.values())
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the only attention that vmap can batch
        warnings.filterwarnings("ignore", "There is a performance drop")  # some operations run image by image
        for piece in pieces(len(images), elements, images.device):
            for name, gradient in per_sample(parameters, images[piece], labels[piece]).items():
                squares[name] += gradient.square().sum(0)
    return squares


def looped_squares(
    model: IsoPruneForImageClassification,
    names: Collection[str],
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision = "no",
) -> Squares:
    """Compute the gradients of one image after the other: right for every model, and slow."""
    leaves = {name: model.model.get_parameter(name).detach().requires_grad_() for name in names}
    squares = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    for image, label in zip(torch.split(images, 1), torch.split(labels, 1), strict=True):
        with replaced_parameters(model.model, leaves):
            loss = summed_loss(model, image, label, precision)
            gradients = loss_gradients(loss, list(leaves.values()))
        for square, gradient in zip(squares.values(), gradients, strict=True):
            if gradient is not None:
                square += gradient.square()
    return squares


class _LayerHooks:
    """Hooks that turn the gradient at a module's output into the squares of its parameters, during one backward pass.

    Args:
        base: Module whose submodules get hooks.
        layers: Module -> leaves.
        batch: Number of samples in the pass.
        is_probe: Omit a module whose squares cannot be computed instead of raising.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, tuple[str, ...]], batch: int, *, is_probe: bool):
        self.squares: Squares = {}
        self._batch = batch
        self._is_probe = is_probe
        self._calls: Counter[str] = Counter()
        self._is_paused = False  # while `module_squares` calls a module again
        self._handles = [
            base.get_submodule(path).register_forward_hook(partial(self._watch, path, leaves), with_kwargs=True)
            for path, leaves in layers.items()
        ]

    def __enter__(self) -> "_LayerHooks":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(
        self,
        path: str,
        leaves: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Register `_square` at the output of a module (forward hook); return a replacement of the output, or None."""
        result = output if isinstance(output, torch.Tensor) else output[0] if isinstance(output, tuple) else None
        if self._is_paused or result is None or first_tensor(args, kwargs) is None:
            return None
        self._calls[path] += 1
        is_start = not result.requires_grad  # no earlier parameter requires a gradient: the backward pass ends here
        if is_start:
            result = result.detach().requires_grad_()
        result.register_hook(partial(self._square, path, leaves, module, args, kwargs))
        if not is_start:
            return None
        result = result.clone()  # the following layers may work in place, which a leaf does not allow
        return result if isinstance(output, torch.Tensor) else (result, *output[1:])

    @torch.no_grad()
    def _square(
        self,
        path: str,
        leaves: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gradient: torch.Tensor,
    ) -> None:
        """Add the squares of a module's parameters (hook of the gradient at its output)."""
        self._is_paused = True
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the only attention that vmap can batch
                squares = module_squares(module, leaves, args, kwargs, gradient, self._batch)
            if self._calls[path] == 1:  # gradients of several calls must be added before they are squared
                self.squares |= {f"{path}.{leaf}": square for leaf, square in squares.items()}
        except RuntimeError:
            if not self._is_probe:
                raise
        finally:
            self._is_paused = False
