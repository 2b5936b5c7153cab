"""Outputs of layers are followed until they are added to another tensor."""

import torch
from torch import Tensor, nn

from isoprune_hf.pruning.repairing.residual_stream import ResidualProbe


class Streams:
    """A probe of some outputs; `found` has the other terms of their sums by name."""

    def __init__(self) -> None:
        self.probe = ResidualProbe()
        self.found: dict[str, Tensor] = {}

    def follow(self, name: str, output: Tensor) -> Tensor:
        self.probe.follow(output, lambda other: self.found.update({name: other}))
        return output


def test_several_outputs_are_followed_at_once() -> None:
    streams, x, first, second = Streams(), torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)
    with streams.probe:
        a = streams.follow("a", first * 1)
        b = streams.follow("b", second * a)
        y = x + b
        _ = y + a
    assert torch.equal(streams.found["b"], x)
    assert "a" not in streams.found  # the other term was computed from a


def test_each_term_is_the_stream_of_the_other() -> None:
    streams, first, second = Streams(), torch.randn(2, 4), torch.randn(2, 4)
    with streams.probe:
        a, b = streams.follow("a", first * 1), streams.follow("b", second * 1)
        _ = a + b
    assert torch.equal(streams.found["a"], second) and torch.equal(streams.found["b"], first)


def test_operations_after_each_output_are_undone() -> None:
    streams, x, scale = Streams(), torch.randn(2, 3, 4), torch.tensor([1.0, 2.0, 4.0, 8.0])
    with streams.probe:
        a = streams.follow("a", torch.randn(2, 4, 3) * 1)
        b = streams.follow("b", torch.randn(2, 3, 4) * 1)
        y = a.permute(0, 2, 1) + x
        _ = nn.functional.dropout(b * scale, 0.0) + y
    assert torch.equal(streams.found["a"], x.permute(0, 2, 1))
    assert torch.equal(streams.found["b"], y / scale)


def test_other_operations_end_a_path_before_output() -> None:
    streams, x = Streams(), torch.randn(2, 4)
    with streams.probe:
        a = streams.follow("a", torch.randn(2, 4) * 1)
        gate = a.sigmoid()
        x.add_(gate)  # is then computed from a, too
        _ = a + x
        b = streams.follow("b", torch.randn(2, 4) * 1)
        _ = b.sigmoid() + gate
        _ = b + gate
    assert "a" not in streams.found and torch.equal(streams.found["b"], gate)


def test_tensor_read_before_the_output_is_a_stream() -> None:
    streams, x = Streams(), torch.randn(2, 4)
    with streams.probe:
        early = x * 2
        a = streams.follow("a", torch.randn(2, 4) * 1)
        x.mul_(a)
        _ = early + a
    assert torch.equal(streams.found["a"], early)
