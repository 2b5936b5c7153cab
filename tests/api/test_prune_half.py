"""Networks of every task that are stored in half precision are pruned, and reopen bit for bit in their own type."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers.clip_networks import make_clip
from helpers.depth_networks import make_dpt
from helpers.detectors import make_yolos
from helpers.segmenters import make_segformer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
)

from isoprune_hf import prune

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Task -> function that makes a network, side of its images, and the Auto class.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, type]] = {
    "features": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(image_size=16, patch_size=4, **SIZES)),
        16,
        AutoModel,
    ),
    "segmentation": (make_segformer, 16, AutoModelForSemanticSegmentation),
    "depth": (make_dpt, 32, AutoModelForDepthEstimation),
    "detection": (make_yolos, 32, AutoModelForObjectDetection),
    "zero-shot": (make_clip, 16, AutoModelForZeroShotImageClassification),
}
DTYPES = [
    pytest.param(torch.bfloat16, marks=pytest.mark.families),
    pytest.param(torch.float16, marks=pytest.mark.faults),
]


def outputs_of(network: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        if hasattr(network, "get_image_features"):
            return [network.get_image_features(pixel_values=images).pooler_output]
        return [value for value in network(images).values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("task", NETWORKS)
def test_stored_type_comes_back(task: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, side, opener = NETWORKS[task]
    torch.manual_seed(0)
    make().to(dtype).save_pretrained(tmp_path / "base")
    base = opener.from_pretrained(tmp_path / "base").eval()
    assert base.dtype is dtype
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))
    pruned = prune(base, [images], target_macs="80%", round_to=1)
    assert pruned.pruned_cost.macs <= 0.8 * pruned.base_cost.macs
    pruned.save(tmp_path / "pruned")
    again = opener.from_pretrained(tmp_path / "pruned").eval()
    kept = pruned.model.state_dict()
    wanted, found = (outputs_of(each, images.to(dtype)) for each in (pruned.model, again))
    assert {value.dtype for value in kept.values() if value.is_floating_point()} == {again.dtype} == {dtype}
    assert wanted and all(value.dtype is dtype and value.isfinite().all() for value in wanted)
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
