"""Networks of depth estimation are pruned without labels, and open by the Auto class of their task."""

import json
from pathlib import Path

import pytest
import torch
from helpers.depth_networks import make_depth_anything, make_dpt, make_glpn
from transformers import AutoModelForDepthEstimation

from isoprune_hf import IsoPruneForDepthEstimation, prune

NETWORKS = {"DepthAnything": (make_depth_anything, 28), "DPT": (make_dpt, 32), "GLPN": (make_glpn, 32)}


@pytest.mark.families
@pytest.mark.parametrize("name", NETWORKS)
def test_depths_keep_their_shape_and_reload(name: str, tmp_path: Path) -> None:
    make, side = NETWORKS[name]
    network, images = make(), torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = network(images).predicted_depth
    pruned = prune(network, [images], target_macs="60%", round_to=1, criterion="gate_fisher")
    assert pruned.loss == "features with random signs"
    assert type(pruned.model) is type(network) and pruned.pruned_cost.macs <= 0.6 * pruned.base_cost.macs
    with torch.no_grad():
        cut = pruned.model(images).predicted_depth
    assert cut.shape == dense.shape and cut.ndim == 3
    pruned.save(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["base"]["task"] == "depth-estimation" and config["format_version"] == 3
    again = AutoModelForDepthEstimation.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        assert type(again) is IsoPruneForDepthEstimation and torch.equal(again(images).predicted_depth, cut)
