import pytest
from helpers.axis_notation import AxisCase, check_axes, reasons, trace_function
from torch.nn import functional as F

IMAGE = (1, 8, 5, 5)

# Name -> function, its parameters and attributes, and the axes of the parameters.
CASES: dict[str, AxisCase] = {
    "a convolution": (
        lambda m: F.conv2d(m.x, m.w, m.b),
        {"b": (6,), "w": (6, 8, 3, 3), "x": IMAGE},
        "A, A B 3! 3!, 1 B 5! 5!",
    ),
    "a convolution of one pixel": (
        lambda m: F.conv2d(m.x, m.w),
        {"w": (6, 8, 1, 1), "x": IMAGE},
        "A B 1 1, 1 B C D",
    ),
    "one pixel with a stride": (
        lambda m: F.conv2d(m.x, m.w, stride=2),
        {"w": (6, 8, 1, 1), "x": IMAGE},
        "A B 1 1, 1 B 5! 5!",
    ),
    "one pixel over a sequence": (
        lambda m: F.conv1d(m.x, m.w),
        {"w": (6, 4, 1), "x": (1, 4, 8)},
        "A B 1, 1 B C",
    ),
    "a window over a table": (
        lambda m: F.conv1d(m.x, m.w, padding=1),
        {"w": (1, 1, 3), "x": (1, 1, 8)},
        "1 1 3!, 1 1 8!",
    ),
    "a window along channels": (
        lambda m: F.conv1d(F.linear(m.x, m.v)[:, None], m.w, padding=1),
        {"v": (8, 4), "w": (1, 1, 3), "x": (2, 4)},
        "A B, 1 1 3!, C B",
    ),
    "a dilated window along channels": (
        lambda m: F.conv1d(F.linear(m.x, m.v)[:, None], m.w, padding=4, dilation=2),
        {"v": (8, 4), "w": (1, 1, 5), "x": (2, 4)},
        "A B, 1 1 5!, C B",
    ),
    "a window along padded channels": (
        lambda m: F.conv1d(F.pad(F.linear(m.x, m.v), (2, 2))[:, None], m.w)[:, 0] @ m.u,
        {"u": (8, 3), "v": (8, 4), "w": (1, 1, 5), "x": (2, 4)},
        "A B, A C, 1 1 5!, D C",
    ),
    "a window along a circle of channels": (
        lambda m: F.conv1d(F.pad(F.linear(m.x, m.v)[:, None], (1, 1), mode="circular"), m.w)[:, 0] @ m.u,
        {"u": (8, 3), "v": (8, 4), "w": (1, 1, 3), "x": (2, 4)},
        "(1+A+1) B, ((1+A)+1) C, 1 1 3!, D C",
    ),
    "a window that shortens channels": (
        lambda m: F.conv1d(F.linear(m.x, m.v)[:, None], m.w),
        {"v": (8, 4), "w": (1, 1, 3), "x": (2, 4)},
        "8! A, 1 1 3!, B A",
    ),
    "a window along channels with a stride": (
        lambda m: F.conv1d(F.linear(m.x, m.v)[:, None], m.w, padding=1, stride=2),
        {"v": (8, 4), "w": (1, 1, 3), "x": (2, 4)},
        "8! A, 1 1 3!, B A",
    ),
    "a window that starts at each channel": (
        lambda m: F.conv1d(F.pad(F.linear(m.x, m.v), (0, 2))[:, None], m.w),
        {"v": (8, 4), "w": (1, 1, 3), "x": (2, 4)},
        "8! A, 1 1 3!, B A",
    ),
    "grouped": (
        lambda m: F.conv2d(m.x, m.w, m.b, groups=2),
        {"b": (12,), "w": (12, 4, 3, 3), "x": IMAGE},
        "(2!*A), (2!*A) B 3! 3!, 1 (2!*B) 5! 5!",
    ),
    "depthwise": (
        lambda m: F.conv2d(m.x, m.w, groups=m.n),
        {"w": (8, 1, 3, 3), "x": IMAGE, "n": 8},
        "A 1 3! 3!, 1 A 5! 5!",
    ),
    "depthwise by a literal": (
        lambda m: F.conv2d(m.x, m.w, groups=8),
        {"w": (8, 1, 3, 3), "x": IMAGE},
        "8! 1 3! 3!, 1 8! 5! 5!",
    ),
    "depthwise with several outputs": (
        lambda m: F.conv2d(m.x, m.w, groups=m.n),
        {"w": (16, 1, 3, 3), "x": IMAGE, "n": 8},
        "(A*2!) 1 3! 3!, 1 A 5! 5!",
    ),
    "transposed and grouped": (
        lambda m: F.conv_transpose2d(m.x, m.w, m.b, groups=2),
        {"b": (12,), "w": (8, 6, 2, 2), "x": IMAGE},
        "(2!*A), (2!*B) A 2! 2!, 1 (2!*B) 5! 5!",
    ),
    "transposed and depthwise": (
        lambda m: F.conv_transpose2d(m.x, m.w, groups=m.n),
        {"w": (8, 1, 2, 2), "x": IMAGE, "n": 8},
        "A 1 2! 2!, 1 A 5! 5!",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_convolution_have_the_expected_axes(name: str) -> None:
    check_axes(CASES[name])


def test_axes_of_convolutions_are_frozen_with_reasons() -> None:
    plain = trace_function(lambda m: F.conv2d(m.x, m.w), w=(6, 8, 3, 3), x=IMAGE)
    assert reasons(plain) == {"positions in the image"}
    grouped = trace_function(lambda m: F.conv2d(m.x, m.w, groups=2), w=(12, 4, 1, 1), x=IMAGE)
    assert reasons(grouped) == {"groups of a convolution"}
    multiplied = trace_function(lambda m: F.conv2d(m.x, m.w, groups=8), w=(16, 1, 1, 1), x=IMAGE)
    assert "outputs of a group" in reasons(multiplied)
