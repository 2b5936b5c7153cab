import pytest
import torch
from helpers.axis_notation import AxisCase, check_axes, reasons, trace_function
from torch.nn import functional as F

from isoprune_hf.pruning.graph.axis import find, is_frozen

IMAGE = (1, 8, 5, 5)

# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
    "a batch norm": (
        lambda m: F.batch_norm(m.x, m.mean, m.var, m.w, m.b),
        {"b": (8,), "mean": (8,), "var": (8,), "w": (8,), "x": IMAGE},
        "A, A, A, A, 1 A B C",
    ),
    "a layer norm": (
        lambda m: F.layer_norm(m.x, m.w.shape, m.w, m.b),
        {"b": (8,), "w": (8,), "x": (4, 8)},
        "A, A, B A",
    ),
    "a layer norm over two dims": (
        lambda m: F.layer_norm(m.x, m.w.shape, m.w),
        {"w": (6, 8), "x": (4, 6, 8)},
        "A B, C A B",
    ),
    "a layer norm without weights": (lambda m: F.layer_norm(m.x, m.x.shape[-1:]), {"x": (4, 8)}, "A B"),
    "an rms norm": (lambda m: F.rms_norm(m.x, m.w.shape, m.w), {"w": (8,), "x": (4, 8)}, "A, B A"),
    "a group norm": (
        lambda m: F.group_norm(m.x, 2, m.w, m.b),
        {"b": (8,), "w": (8,), "x": IMAGE},
        "(2!*A), (2!*A), 1 (2!*A) B C",
    ),
    "a group norm of one group": (
        lambda m: F.group_norm(m.x, 1, m.w, m.b),
        {"b": (8,), "w": (8,), "x": IMAGE},
        "A, A, 1 A B C",
    ),
    "a group norm of one channel a group": (
        lambda m: F.group_norm(m.x, m.n, m.w, m.b),
        {"b": (8,), "w": (8,), "x": IMAGE, "n": 8},
        "A, A, 1 A B C",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_norms_have_the_expected_axes(name: str) -> None:
    check_axes(CASES[name])


def test_groups_of_norms_are_frozen_with_reason() -> None:
    assert reasons(trace_function(lambda m: F.group_norm(m.x, 2), x=IMAGE)) == {"groups of a norm"}
    uneven = trace_function(lambda m: F.group_norm(torch.cat([m.a, m.b], 1), 2), a=(1, 3, 4), b=(1, 5, 4))
    assert reasons(uneven) == {"groups of a norm (a split at [3] lies inside a factor)"}


def test_statistics_of_a_group_norm_follow_the_groups() -> None:
    per_channel = trace_function(lambda m: F.group_norm(m.x, m.n, m.w), x=IMAGE, w=(8,), n=8)
    (norm,) = (op for op in per_channel.ops if op.name == "native_group_norm")
    assert [find(axes[1]) for axes in norm.outputs] == [find(per_channel.tensors["w"][0])] * 3
    two = trace_function(lambda m: F.group_norm(m.x, 2, m.w), x=IMAGE, w=(8,))
    (norm,) = (op for op in two.ops if op.name == "native_group_norm")
    assert [axes[1].size for axes in norm.outputs] == [8, 2, 2] and is_frozen(norm.outputs[1][1])
