from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from isoprune_hf.models.layout import in_fast_layout

NHWC = torch.channels_last


class ConvNet(nn.Module):
    """Two convolutions, and a function that turns their features (B, 6, 4, 4) into rows."""

    def __init__(self, rows: Callable[[Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.rows = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1), rows
        self.head = nn.Linear(96, 4)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.rows(self.second(self.first(pixel_values)))))


def images() -> Tensor:
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def is_nhwc(net: ConvNet) -> bool:
    return all(layer.weight.is_contiguous(memory_format=NHWC) for layer in (net.first, net.second))


def test_convolutions_run_in_nhwc_within_the_context():
    net, pixels, formats = ConvNet(lambda x: x.flatten(1)).eval(), images(), []
    places = [parameter.data_ptr() for parameter in net.parameters()]
    expected = net(pixels).logits
    with in_fast_layout(net, pixels):
        handle = net.second.register_forward_hook(
            lambda module, inputs, output: formats.append(output.is_contiguous(memory_format=NHWC))
        )
        torch.testing.assert_close(net(pixels).logits, expected)
        handle.remove()
        assert is_nhwc(net)
    assert formats == [True]
    assert [parameter.data_ptr() for parameter in net.parameters()] == places
    assert torch.equal(net(pixels).logits, expected)


def as_rows_of_bytes(x: Tensor) -> Tensor:
    return torch.as_strided(x, (len(x), 96), (96, 1))


@pytest.mark.parametrize("rows", [lambda x: x.view(len(x), 96), as_rows_of_bytes], ids=["fails", "differs"])
def test_network_that_needs_nchw_stays_so(rows):
    net, pixels = ConvNet(rows).eval(), images()
    expected = net(pixels).logits
    with in_fast_layout(net, pixels):
        assert torch.equal(net(pixels).logits, expected)
        assert not is_nhwc(net)


def test_network_of_one_convolution_is_not_tried():
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 5, 2, stride=2)

        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            raise AssertionError("no pass is needed")

    net = Patches()
    with in_fast_layout(net, images()):
        assert not net.patches.weight.is_contiguous(memory_format=NHWC)


def test_weights_are_restored_after_an_error():
    net = ConvNet(lambda x: x.flatten(1)).eval()
    with pytest.raises(KeyError), in_fast_layout(net, images()):
        raise KeyError
    assert not is_nhwc(net)
