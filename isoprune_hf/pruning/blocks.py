"""Residual blocks that can leave whole: what they put out is what they were given plus what they compute."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.pruning.groups import ResidualBlock
from isoprune_hf.pruning.tracing import traced_copy

# What may lie between a block's input and its output on the shortcut; torch.abs stands for a ReLU (`tracing`).
_SHORTCUT = ("Add", "Abs", "Relu", "View", "UnsafeView", "Reshape", "Alias", "Clone", "Transpose", "Permute")
_LISTS = (nn.Sequential, nn.ModuleList)


@dataclass
class _Call:
    """What made the first input and the output of one call of a module, taken at once: a later operation in place on
    the same tensor would put itself there."""

    shape: torch.Size
    start: torch.autograd.graph.Node | None
    end: torch.autograd.graph.Node | None = None


def find_blocks(model: IsoPruneForImageClassification) -> tuple[ResidualBlock, ...]:
    """Find the residual blocks of a model; reads shapes only and leaves the model untouched.

    A block is an item of a list of modules that holds another item of its class, is called once, owns parameters,
    keeps the shape of its first input, and adds to it: in the graph of one forward pass a way of sums, ReLUs and views
    leads from its output to its input. Of blocks within blocks only the innermost count, so a stage is never offered;
    stems, patch embeddings, downsampling and classifiers fail at the shape or at the sum.

    Returns:
        Blocks in the order of `named_modules`; their signature is the name of their class.

    Raises:
        UnsupportedArchitectureError: The model does not run on the meta device, or holds an attention of an unknown
            build.
    """
    network = traced_copy(model.model).network
    calls = _record_calls(network, tuple(model.config.image_size))
    residual = [path for path, found in calls.items() if len(found) == 1 and _adds_to_its_input(found[0])]
    innermost = [path for path in residual if not any(other.startswith(f"{path}.") for other in residual)]
    modules = dict(model.model.named_modules())
    return tuple(
        ResidualBlock(
            path,
            type(modules[path]).__name__,
            tuple(f"{path}.{name}" for name, _ in modules[path].named_parameters()),
        )
        for path in innermost
        if _is_one_of_several(modules[path], modules[path.rpartition(".")[0]])
    )


def _is_one_of_several(module: nn.Module, parent: nn.Module) -> bool:
    return isinstance(parent, _LISTS) and sum(type(sibling) is type(module) for sibling in parent.children()) > 1


def _record_calls(network: nn.Module, image_size: tuple[int, ...]) -> dict[str, list[_Call]]:
    """Run the network and note the calls of its modules with parameters, in the order of `named_modules`.

    `end` stays None where the output has another shape than the first input.
    """
    calls: dict[str, list[_Call]] = {}
    for path, module in network.named_modules():
        if path and not isinstance(module, _LISTS) and any(True for _ in module.parameters()):
            calls[path] = []
            module.register_forward_pre_hook(partial(_note_input, calls[path]), with_kwargs=True)
            module.register_forward_hook(partial(_note_output, calls[path]))
    try:
        with torch.enable_grad():
            network(torch.zeros(1, *image_size, device="meta"))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedArchitectureError(
            f"the blocks of {type(network).__name__} cannot be found, it does not run: {reason}"
        ) from error
    return calls


def _note_input(calls: list[_Call], _: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    given = next(iter([*args, *kwargs.values()]), None)
    is_tensor = isinstance(given, torch.Tensor)
    calls.append(_Call(given.shape if is_tensor else torch.Size(), given.grad_fn if is_tensor else None))


def _note_output(calls: list[_Call], _: nn.Module, args: tuple[object, ...], output: object) -> None:
    made = output[0] if isinstance(output, tuple) and output else output
    if isinstance(made, torch.Tensor) and made.shape == calls[-1].shape:
        calls[-1].end = made.grad_fn


def _adds_to_its_input(call: _Call) -> bool:
    if call.start is None or call.end is None:
        return False
    stack, seen, has_sum = [call.end], set(), False
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is call.start:
            return has_sum
        name = node.name().partition("Backward")[0]
        if name in _SHORTCUT:
            has_sum = has_sum or name == "Add"
            stack.extend(before for before, _ in node.next_functions if before is not None)
    return False
