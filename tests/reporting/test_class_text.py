"""Classes in words."""

import pytest

from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.reporting.class_text import describe_class


@pytest.mark.parametrize(
    ("signature", "heads", "count", "text"),
    [
        ("Linear.out|Linear.in", 0, 4, "4 hidden layers, Linear to Linear"),
        ("Conv2d.out|BatchNorm2d.out|Conv2d.in", 0, 1, "1 hidden layer, Conv2d to Conv2d"),
        ("Conv2d.out(3, 3)|Conv2d.depthwise(3, 3)|Conv2d.in(1, 1)", 0, 2, "2 hidden layers, Conv2d to Conv2d"),
        ("Attention:Linear.out|Linear.in", 4, 3, "3 attentions of 4 heads"),
        ("Conv2d.out|BatchNorm2d.out|Linear.in|Linear.in", 0, 1, "1 stream, written by 1 layer and read by 2 layers"),
        (
            "Parameter|Conv2d.out|Linear.out|LayerNorm.out|Linear.in",
            0,
            1,
            "1 stream, written by 2 layers and read by 1 layer",
        ),
    ],
)
def test_class_is_described_by_its_layers(signature: str, heads: int, count: int, text: str) -> None:
    assert describe_class([CoupledGroup("name", signature, 8, (), heads)] * count) == text
