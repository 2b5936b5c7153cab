"""The benchmark of captions: each is as frequent in its scenes, and a network has the captions of itself."""

import pytest
import torch
from peer_cuts import IMPORTANCES, cut
from zero_shot import CAPTIONS, draw_scenes, loss_of, make_network, measure, tokens_of

pytestmark = pytest.mark.benchmarks


def test_captions_are_as_frequent_and_tokens_differ() -> None:
    images, kinds = draw_scenes(48, seed=5)
    assert images.shape == (48, 3, 32, 32) and images.abs().max() <= 1
    assert kinds.bincount().tolist() == [2] * 24 and len({*map(tuple, tokens_of(CAPTIONS).tolist())}) == 24
    assert torch.equal(draw_scenes(48, seed=5)[0], images)


def test_network_has_the_captions_of_itself() -> None:
    torch.manual_seed(0)
    network = make_network().eval()
    images, _ = draw_scenes(24, seed=5)
    with torch.no_grad():
        best = network(input_ids=tokens_of(CAPTIONS), pixel_values=images).logits_per_image.argmax(1)
    assert measure(network, network, images, best) == ["100.0", "100.0", "1.0000"]


def test_peer_cuts_the_tower_of_images_alone() -> None:
    torch.manual_seed(0)
    network = make_network().eval()
    images, kinds = draw_scenes(24, seed=5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss_of(network, images, kinds).backward()
    pruned = cut(
        network,
        images[:1],
        0.5,
        IMPORTANCES["torch-pruning, isomorphic, Taylor with labels"],
        lambda name: name == "visual_projection",
        lambda network, images: network.get_image_features(images).pooler_output.sum(),
    )
    texts, tower = dict(network.text_model.named_parameters()), pruned.vision_model
    assert all(torch.equal(texts[name], value) for name, value in pruned.text_model.named_parameters())
    assert tower.embeddings.patch_embedding.out_channels == 32 and pruned.visual_projection.out_features == 32
    with torch.no_grad():
        assert pruned(input_ids=tokens_of(CAPTIONS), pixel_values=images).logits_per_image.shape == (24, 24)
