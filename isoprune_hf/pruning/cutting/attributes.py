"""The numbers that modules keep about their tensors, after a cut."""

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn

from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.equations import evaluate
from isoprune_hf.pruning.graph.layers import BatchNorm, ConvNd
from isoprune_hf.pruning.graph.traced_int import ARITHMETIC, COMPARE, Attribute, Expression, Operation, atoms
from isoprune_hf.pruning.graph.verify import axis_size

_SCALES = re.compile(".*(scal|factor|norm|temperature).*")
# Widths that are kept for information alone, so that no operation has shown what they are.
_WIDTHS = re.compile(r"(.*_)?(dim|dims|dim_out|out_dim|features|channels|chs|planes|width|hidden_size|head_size)")


def set_numbers(
    graph: AxisGraph, sizes: Mapping[int, int], before: nn.Module, network: nn.Module, gone: tuple[str, ...]
) -> None:
    """Let the numbers of a cut network agree with its tensors, in place.

    Args:
        graph: The graph of the network before the cut.
        sizes: Sizes of its leaves after the cut.
        before: The network before the cut.
        network: The network, its tensors cut.
        gone: Prefixes of the modules that have left.
    """
    modules = {path: module for path, module in network.named_modules() if not f"{path}.".startswith(gone or ("\0",))}
    solved = graph.solution.attributes
    for attribute, polynomial in solved.items():
        if attribute.module in modules:
            _set(modules[attribute.module], attribute, evaluate(polynomial, sizes))
    for module in modules.values():
        _set_layer_numbers(module)
        _forget_tensors(module)
    _set_scales(graph, sizes, modules)
    known = {(attribute.module, attribute.name) for attribute in solved}
    for path, module in before.named_modules():
        if path in modules:
            _set_widths(path, module, modules[path], known)
    _keep_comparisons(graph, sizes, dict(before.named_modules()), modules, known)


def _keep_comparisons(
    graph: AxisGraph,
    sizes: Mapping[int, int],
    before: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
    known: Collection[tuple[str, str]],
) -> None:
    """Give a width that is there for information its old value back where a comparison would come out otherwise."""

    def value(expression: Expression) -> int:
        if isinstance(expression, Attribute):
            number = vars(modules[expression.module])[expression.name]
            return number if expression.entry is None else number[expression.entry]
        if isinstance(expression, Operation):
            return ARITHMETIC[expression.symbol](value(expression.left), value(expression.right))
        return expression if isinstance(expression, int) else axis_size(expression, sizes)

    for comparison in graph.trace.comparisons:
        names = {atom for side in (comparison.left, comparison.right) for atom in atoms(side)}
        names = {atom for atom in names if isinstance(atom, Attribute)}
        if not names or any(name.module not in modules for name in names):
            continue
        if COMPARE[comparison.symbol](value(comparison.left), value(comparison.right)) != comparison.outcome:
            for name in names:
                if (name.module, name.name) not in known:
                    vars(modules[name.module])[name.name] = vars(before[name.module])[name.name]


def _set(module: nn.Module, attribute: Attribute, value: int) -> None:
    if attribute.entry is None:
        module.__dict__[attribute.name] = value
    else:
        entries = list(module.__dict__[attribute.name])
        entries[attribute.entry] = value
        module.__dict__[attribute.name] = type(module.__dict__[attribute.name])(entries)


def _set_layer_numbers(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, ConvNd):
        first, second = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, BatchNorm) and module.weight is not None:
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]


def _set_scales(graph: AxisGraph, sizes: Mapping[int, int], modules: Mapping[str, nn.Module]) -> None:
    """The scale of attention follows its dims: fused attention takes it from the tensors, eager from the module."""
    for product in graph.trace.products:
        if product.has_weight or product.module not in modules:
            continue
        inner = product.sizes[-2]
        size = axis_size(inner, sizes)
        for name, value in vars(modules[product.module]).items() if size != inner.size else ():
            if type(value) is float and _SCALES.fullmatch(name) and abs(value * inner.size**0.5 - 1) < 1e-9:
                vars(modules[product.module])[name] = size**-0.5


def _set_widths(path: str, before: nn.Module, after: nn.Module, known: Collection[tuple[str, str]]) -> None:
    """A width is what all dims of its old size in the tensors of the module and its children have become."""
    for name, value in vars(before).items():
        if (
            type(value) is not int
            or not _WIDTHS.fullmatch(name)
            or (path, name) in known
            or vars(after)[name] != value
        ):
            continue
        found = {
            new
            for old, now in zip([before, *before.children()], [after, *after.children()], strict=False)
            for old_tensor, new_tensor in zip(
                old._parameters.values(), now._parameters.values() if len(now._parameters) else (), strict=False
            )
            if old_tensor is not None and new_tensor is not None
            for size, new in zip(old_tensor.shape, new_tensor.shape, strict=True)
            if size == value
        }
        if len(found) == 1:
            vars(after)[name] = found.pop()


def _forget_tensors(module: nn.Module) -> None:
    """Tables of tensors that a module keeps from one pass to the next are of the old sizes."""
    for name, value in vars(module).items():
        is_table = not name.startswith("_") and isinstance(value, dict) and value
        if is_table and all(isinstance(entry, torch.Tensor) for entry in value.values()):
            vars(module)[name] = type(value)()
