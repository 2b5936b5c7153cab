"""Save networks that differ from what their constructor builds, open them again, and compare the logits.

    python benchmarks/reload_difference.py [NAME ...]

Each network is what its trained weights, or a user, make of an architecture; the weights are random, with drawn
statistics of BatchNorm. It is saved dense and cut to half of each group's channels, and each folder is opened by
`from_pretrained`. Prints a table with the largest difference between a logit before and after.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from isoprune_hf import IsoPruneForImageClassification, Pruned, prune


def with_silu() -> nn.Module:
    """Return a ResNet-18 of timm whose activations were replaced after it was built."""
    network = timm.create_model("resnet18")
    for path, module in [*network.named_modules()]:
        if isinstance(module, nn.ReLU):
            network.set_submodule(path, nn.SiLU(inplace=True))
    return network


# Name -> (what makes it differ, how it is built, side of its images).
NETWORKS: Mapping[str, tuple[str, Callable[[], nn.Module], int]] = {
    "inception_v3": (
        "`transform_input` of its weights",
        partial(torchvision.models.inception_v3, transform_input=True, init_weights=False),
        299,
    ),
    "googlenet": (
        "`transform_input` of its weights, no auxiliary heads",
        partial(torchvision.models.googlenet, transform_input=True, aux_logits=False, init_weights=False),
        224,
    ),
    "vit_b_16": ("384 pixels of its SWAG weights", partial(torchvision.models.vit_b_16, image_size=384), 384),
    "fbnetc_100": ("`bn_eps` of its weights", partial(timm.create_model, "fbnetc_100", bn_eps=1e-3), 224),
    "resnet18": ("SiLU in place of ReLU", with_silu, 224),
}


def draw(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network with random weights, and statistics of BatchNorm that leave no layer an identity."""
    torch.manual_seed(0)
    network = build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def reload_difference(result: Pruned, network: nn.Module, images: torch.Tensor) -> float:
    """Save a result, open the folder, and return the largest difference from the logits of `network`."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        result.save(Path(folder) / "saved")
        opened = IsoPruneForImageClassification.from_pretrained(Path(folder) / "saved")
        difference: torch.Tensor = (opened(images).logits - network(images)).abs().max()
        return difference.item()


def measure(name: str) -> str:
    """Return the row of a network."""
    reason, build, side = NETWORKS[name]
    network, images = draw(build), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    differences = []
    for ratio in (0.0, 0.5):
        result = prune(network, images, criterion="l1", ratio=ratio, head_ratio=ratio)
        differences.append(reload_difference(result, result.model if ratio else network, images))
    dense, cut = differences
    return f"| `{name}` | {reason} | {dense:g} | {cut:g} |"


def main(*names: str) -> None:
    print("| network | differs from its constructor by | dense | cut to a half |\n|---|---|---|---|")
    for name in names or NETWORKS:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
