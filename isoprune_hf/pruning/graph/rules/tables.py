"""All rules: `AXIS_RULES` by the name of the aten operation, `SIZE_RULES` by the name of the Python call.

The name of an in-place variant (`add_`) needs no entry of its own if the rule is the same.
"""

from collections.abc import Mapping

from isoprune_hf.pruning.graph.rules import (
    convolution,
    creation,
    indexing,
    norms,
    parts,
    pointwise,
    products,
    reductions,
    views,
    windows,
)
from isoprune_hf.pruning.graph.rules.registry import AxisRule, SizeRule, merge_tables

AXIS_RULES: Mapping[str, AxisRule] = merge_tables(
    (
        convolution.rule,
        creation.rule,
        indexing.rule,
        norms.rule,
        parts.rule,
        pointwise.rule,
        products.rule,
        reductions.rule,
        views.rule,
        windows.rule,
    )
)
SIZE_RULES: Mapping[str, SizeRule] = merge_tables(
    (convolution.size_rule, creation.size_rule, norms.size_rule, parts.size_rule, products.size_rule, views.size_rule)
)
