"""Update the numbers that modules keep about their tensors after a cut: call `set_attributes`."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.difference import number_tables
from isoprune_hf.pruning.graph.axis_graph import AxisGraph
from isoprune_hf.pruning.graph.layers import BatchNorm, ConvNd
from isoprune_hf.pruning.graph.polynomial import evaluate
from isoprune_hf.pruning.graph.traced_int import ARITHMETIC, COMPARE, Attribute, Expression, Operation, atoms
from isoprune_hf.pruning.graph.verify import axis_size

# Names of attention scales, and of widths that no operation uses, so that the trace does not know their meaning.
_SCALE_NAMES = re.compile(".*(scal|factor|norm|temperature).*")
_WIDTH_NAMES = re.compile(r"(.*_)?(dim|dims|dim_out|out_dim|features|channels|chs|planes|width|hidden_size|head_size)")

AttributeKeys = Collection[tuple[str, str]]  # (path of a module, name of an attribute)
Modules = Mapping[str, nn.Module]
Tables = Mapping[tuple[str, str], dict[str, Any]]  # see `number_tables`


def set_attributes(
    graph: AxisGraph, sizes: Mapping[int, int], before: nn.Module, network: nn.Module, removed: Sequence[str]
) -> None:
    """Set the numbers that the modules of a cut network keep about their tensors, in place.

    Args:
        graph: The graph of the network before the cut.
        sizes: Sizes of its leaves after the cut.
        before: The network before the cut.
        network: The network with cut tensors.
        removed: Prefixes of the removed modules, each ending in a dot.
    """
    modules = {
        path: module
        for path, module in network.named_modules()
        if not f"{path}.".startswith(tuple(removed) or ("\0",))
    }
    solved = graph.solution.attributes
    tables = {place: table for place, table in number_tables(network).items() if place[0] in modules}
    for attribute, polynomial in solved.items():
        if attribute.table in tables:
            _set_attribute(tables[attribute.table], attribute, evaluate(polynomial, sizes))
    for module in modules.values():
        _set_layer_sizes(module)
        _clear_tensor_tables(module)
    _set_attention_scales(graph, sizes, modules)
    known = {(attribute.module, attribute.name) for attribute in [*solved, *_read_attributes(graph)]}
    modules_before = dict(before.named_modules())
    for path, module in modules_before.items():
        if path in modules:
            _set_unused_widths(path, module, modules[path], known)
    _restore_compared_widths(graph, sizes, number_tables(before), tables, known)


def _read_attributes(graph: AxisGraph) -> Iterator[Attribute]:
    """Yield the attributes from which the code computes sizes; those that are not solved keep their values."""
    for equation in graph.trace.equations:
        for side in (equation.left, equation.right):
            yield from (atom for atom in atoms(side) if isinstance(atom, Attribute))


def _restore_compared_widths(
    graph: AxisGraph, sizes: Mapping[int, int], before: Tables, tables: Tables, known: AttributeKeys
) -> None:
    """Restore the old value of a width that only informs, if a comparison of the forward pass changed its outcome."""

    def value(expression: Expression) -> int:
        if isinstance(expression, Attribute):
            number = tables[expression.table][expression.key]
            return int(number if expression.entry is None else number[expression.entry])
        if isinstance(expression, Operation):
            return ARITHMETIC[expression.symbol](value(expression.left), value(expression.right))
        return expression if isinstance(expression, int) else axis_size(expression, sizes)

    for comparison in graph.trace.comparisons:
        compared = {
            atom for side in (comparison.left, comparison.right) for atom in atoms(side) if isinstance(atom, Attribute)
        }
        if not compared or any(attribute.table not in tables for attribute in compared):
            continue
        if COMPARE[comparison.symbol](value(comparison.left), value(comparison.right)) != comparison.outcome:
            for attribute in compared:
                if (attribute.module, attribute.name) not in known:
                    tables[attribute.table][attribute.key] = before[attribute.table][attribute.key]


def _set_attribute(table: dict[str, Any], attribute: Attribute, value: int) -> None:
    old = table[attribute.key]
    if attribute.entry is None:
        table[attribute.key] = value
    else:
        entries = list(old)
        entries[attribute.entry] = value
        table[attribute.key] = type(old)(entries)


def _set_layer_sizes(module: nn.Module) -> None:
    """Set the sizes that layers of torch keep, from the shape of their weight."""
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


def _set_attention_scales(graph: AxisGraph, sizes: Mapping[int, int], modules: Modules) -> None:
    """Set scales of attention to size**-0.5, which eager attention reads and fused attention computes."""
    for product in graph.trace.matrix_products:
        if product.has_weight or product.module not in modules:
            continue
        inner = product.sizes[-2]
        size = axis_size(inner, sizes)
        if size == inner.size:
            continue
        attributes = vars(modules[product.module])
        for name, value in attributes.items():
            is_scale = type(value) is float and _SCALE_NAMES.fullmatch(name)
            if is_scale and abs(value * inner.size**0.5 - 1) < 1e-9:
                attributes[name] = size**-0.5


def _set_unused_widths(path: str, before: nn.Module, after: nn.Module, known: AttributeKeys) -> None:
    """Set widths that only inform: to the new size of all dims that had the old size, if it is unique.

    The dims are those of the tensors of the module and of its children.
    """
    attributes = vars(after)
    for name, value in vars(before).items():
        if type(value) is not int or not _WIDTH_NAMES.fullmatch(name):
            continue
        if (path, name) in known or attributes[name] != value:
            continue
        found = {new for old, new in _changed_dims(before, after) if old == value}
        if len(found) == 1:
            attributes[name] = found.pop()


def _changed_dims(before: nn.Module, after: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield (size before, size after) of every dim of the parameters of a module and its children."""
    for old, new in zip([before, *before.children()], [after, *after.children()], strict=False):
        # A removed child has a stand-in without parameters.
        for old_tensor, new_tensor in zip(old._parameters.values(), new._parameters.values(), strict=False):
            if old_tensor is not None and new_tensor is not None:
                yield from zip(old_tensor.shape, new_tensor.shape, strict=True)


def _clear_tensor_tables(module: nn.Module) -> None:
    """Clear dicts of tensors that a module caches between forward passes: they have the old sizes."""
    for name, value in vars(module).items():
        is_table = not name.startswith("_") and isinstance(value, dict) and value
        if is_table and all(isinstance(entry, torch.Tensor) for entry in value.values()):
            vars(module)[name] = type(value)()
