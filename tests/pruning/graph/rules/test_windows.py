import pytest
from helpers.axis_notation import AxisCase, FrozenCase, check_axes, check_frozen, reasons, spell, trace_function
from torch.nn import functional as F

IMAGE = (1, 8, 5, 5)

# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
    "pooled": (lambda m: F.max_pool2d(m.x, 2) + m.y, {"x": (1, 8, 4, 4), "y": (8, 1, 1)}, "1 A 4! 4!, A 1 1"),
    "pooled by means": (lambda m: F.avg_pool2d(m.x, 2), {"x": IMAGE}, "1 A 5! 5!"),
    "pooled to one pixel": (
        lambda m: F.adaptive_avg_pool2d(m.x, 1) + m.y,
        {"x": IMAGE, "y": (8, 1, 1)},
        "1 A B C, A 1 1",
    ),
    "pooled to two pixels": (lambda m: F.adaptive_avg_pool2d(m.x, 2), {"x": IMAGE}, "1 A 5! 5!"),
    "pooled without a batch": (lambda m: F.max_pool2d(m.x, (3, 1), 1, (1, 0)), {"x": (4, 6, 5)}, "A 6! 5!"),
    "pooled without a batch, by means": (lambda m: F.avg_pool1d(m.x, 3, 1, 1), {"x": (4, 6)}, "A 6!"),
    "resized": (lambda m: F.interpolate(m.x, scale_factor=2), {"x": IMAGE}, "1 A 5! 5!"),
    "resized smoothly": (lambda m: F.interpolate(m.x, size=(7, 7), mode="bicubic"), {"x": IMAGE}, "1 A 5! 5!"),
    "mirrored": (lambda m: F.pad(m.x, (1, 1, 1, 1), mode="reflect"), {"x": IMAGE}, "1 A 5! 5!"),
    "sampled at positions": (
        lambda m: F.grid_sample(m.x, m.y, align_corners=False),
        {"x": IMAGE, "y": (1, 3, 4, 2)},
        "1 A 5! 5!, 1 3! 4! 2!",
    ),
    "windows to columns": (
        lambda m: F.unfold(m.a, 3) + m.b,
        {"a": (1, 4, 5, 5), "b": (1, 36, 9)},
        "1 A 5! 5!, 1 (A*9!) 9!",
    ),
    "columns to windows": (
        lambda m: F.fold(m.a, (5, 5), 3) + m.b,
        {"a": (1, 36, 9), "b": (1, 4, 5, 5)},
        "1 (A*9!) 9!, 1 A 5! 5!",
    ),
}


# Name -> function of a parameter `a` of (4, 6), its axes, and the reason why one is frozen.
FROZEN: dict[str, FrozenCase] = {
    "windows": (lambda m: m.a.unfold(0, 2, 1), "4! A", "a window slides over it"),
}


@pytest.mark.parametrize("name", CASES)
def test_sliding_windows_have_the_expected_axes(name: str) -> None:
    check_axes(CASES[name])


@pytest.mark.parametrize("name", FROZEN)
def test_sliding_windows_freeze_axes(name: str) -> None:
    check_frozen(FROZEN[name])


def test_unfold_freezes_image_sides() -> None:
    """The image has a side that could be mistaken for channels."""
    trace = trace_function(lambda m: F.unfold(m.a, 3), a=(1, 1, 5, 8))
    assert spell(trace) == "1 1 5! 8!"


def test_pooled_sides_are_frozen_with_reason() -> None:
    trace = trace_function(lambda m: F.max_pool2d(m.x, 2), x=IMAGE)
    assert reasons(trace) == {"a window slides over it"}
