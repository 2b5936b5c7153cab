"""The sentence about a quantised model tells measured layers in fp32 from those that are always in it."""

import pytest

from isoprune_hf.reporting.export_text import describe_quantization

RECORD = {"calibration_images": 192, "held_out_images": 64, "divergence": 0.0123, "share_of_weights": 0.96}
MEASURED = "in eight bits (96% of the weights), ranges of 192 training images; on 64 others predictions differ from"


@pytest.mark.parametrize(
    ("always", "left_out", "kept"),
    [
        ([], [], "all layers"),
        ([], ["conv3", "fc"], "all layers but conv3, fc, which changed the outputs most,"),
        (["conv0"], ["conv0"], "all layers but conv0, always in fp32 in this format,"),
        (
            ["conv0"],
            ["conv0", "conv3", "fc"],
            "all layers but conv0, always in fp32 in this format, and conv3, fc, which changed the outputs most,",
        ),
    ],
)
def test_text_names_why_layers_stay_fp32(always: list[str], left_out: list[str], kept: str) -> None:
    text = describe_quantization({**RECORD, "always_out": always, "left_out": left_out})
    assert text == f"{kept} {MEASURED} fp32 by 0.0123 nats"


def test_record_without_always_left_out_layers_reads() -> None:
    text = describe_quantization({**RECORD, "left_out": ["fc"]})
    assert text.startswith("all layers but fc, which changed the outputs most, in eight bits (96%")
