"""The benchmark of captions: each is as frequent in its scenes, and a network has the captions of itself."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel
from zero_shot import CAPTIONS, TEXT, VISION, draw_scenes, measure, tokens_of

pytestmark = pytest.mark.benchmarks


def test_captions_are_as_frequent_and_tokens_differ() -> None:
    images, kinds = draw_scenes(48, seed=5)
    assert images.shape == (48, 3, 32, 32) and images.abs().max() <= 1
    assert kinds.bincount().tolist() == [2] * 24 and len({*map(tuple, tokens_of(CAPTIONS).tolist())}) == 24
    assert torch.equal(draw_scenes(48, seed=5)[0], images)


def test_network_has_the_captions_of_itself() -> None:
    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=32)).eval()
    images, _ = draw_scenes(24, seed=5)
    with torch.no_grad():
        best = network(input_ids=tokens_of(CAPTIONS), pixel_values=images).logits_per_image.argmax(1)
    assert measure(network, network, images, best) == ["100.0", "100.0", "1.0000"]
