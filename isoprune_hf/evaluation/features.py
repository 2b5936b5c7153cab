"""Compare the features of a network with those of the dense one on a split: call `evaluate_features`."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BaseImageProcessor

from isoprune_hf.data.decoding import Rows, check_broken
from isoprune_hf.data.loading import ALONE, ImageBatch, LoaderOptions, Ranks, eval_loader
from isoprune_hf.data.pixels import normalised
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.evaluate import eval_mode
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.held import HeldModel, HeldOutput
from isoprune_hf.terminal import with_progress

NEIGHBOURS = 20
_TEMPERATURE = 0.07
_ROWS = 1024  # of the matrix of similarities at a time


class Features(NamedTuple):
    """The features of the N images of a split, the same on every rank.

    Args:
        pooled: One vector for each image, (N, C).
        labels: (N,).
        cosines: Cosine similarity of the pooled features with those of the dense network, (N,).
        position_cosines: The mean of those at all positions of the first output, such as tokens, (N,).
        broken: Whether the image could not be read, (N,).
    """

    pooled: Tensor
    labels: Tensor
    cosines: Tensor
    position_cosines: Tensor
    broken: Tensor


def evaluate_features(
    model: HeldModel,
    dense: nn.Module | None,
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    *,
    accelerator: Accelerator | None = None,
) -> Figures:
    """Compute how near the features of a network are to those of its dense base, and how well they tell classes apart.

    Args:
        model: Gives features, on its current device.
        dense: The dense network, on the same device; None if the model is the dense one, or it is not known.
        split: Images with the columns `image` and `label`.
        processor: Makes the pixel values.
        options: How the images are loaded.
        accelerator: The ranks that share the work. All must call this with the same split.

    Returns:
        `cosine`: mean cosine similarity of the pooled features with the dense ones; `position_cosine`: that at each
        position of an output that has several; both without `dense` left out. `knn`: share of the images whose class
        is found by the other images of the split, see `find_by_neighbours`; left out for a single class, and for lists
        of classes. `images`, and `broken` if images could not be read.

    Raises:
        DatasetError: An image cannot be read, or more images than the policy allows.
    """
    ranks = ALONE if accelerator is None else Ranks(accelerator.process_index, accelerator.num_processes)
    loader = eval_loader(split, processor, options, ranks)
    batches = with_progress(loader, "evaluate", "batch", rank=ranks.rank)
    found = _read_shard(model, dense, processor, batches, len(split))
    if accelerator is not None and ranks.world > 1:
        # Each place was written by one rank, so the sum is a union.
        found = Features(*(accelerator.reduce(part.to(accelerator.device), reduction="sum").cpu() for part in found))
    broken = found.broken > 0
    check_broken(int(broken.sum()), options.decoding, "the evaluation")
    read = ~broken if options.decoding.broken == "skip" else torch.ones_like(broken)
    if not read.any():
        raise DatasetError("data: the evaluation split has no readable image; fix its files, or set data.eval_split")
    figures: Figures = {"images": int(read.sum())}
    if dense is not None:
        figures["cosine"] = float(found.cosines[read].mean())
        if found.position_cosines.any():
            figures["position_cosine"] = float(found.position_cosines[read].mean())
    labels = found.labels[read]
    if (labels != labels[0]).any():
        figures["knn"] = float((find_by_neighbours(found.pooled[read], labels) == labels).double().mean())
    return figures | ({"broken": int(broken.sum())} if broken.any() else {})


def find_by_neighbours(features: Tensor, labels: Tensor) -> Tensor:
    """Return the class of each image by its nearest other images: of 20 by cosine similarity, weighted.

    Args:
        features: (N, C).
        labels: (N,).

    Returns:
        Classes (N,). A neighbour of similarity s counts exp(s / 0.07).

    Source:
        Wu et al., Unsupervised feature learning via non-parametric instance discrimination, CVPR 2018, section 3.4,
        with the 20 neighbours of Caron et al., DINO, ICCV 2021.
    """
    unit = nn.functional.normalize(features.float(), dim=1)
    classes = int(labels.max()) + 1
    found = []
    for start in range(0, len(unit), _ROWS):
        similarities = unit[start : start + _ROWS] @ unit.T
        rows = torch.arange(len(similarities))
        similarities[rows, rows + start] = -torch.inf  # an image is no neighbour of itself
        near = similarities.topk(min(NEIGHBOURS, len(unit) - 1), dim=1)
        votes = torch.zeros(len(similarities), classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[near.indices], (near.values.double() / _TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


@torch.no_grad()
def _read_shard(
    model: HeldModel,
    dense: nn.Module | None,
    processor: BaseImageProcessor,
    batches: Iterable[ImageBatch],
    images: int,
) -> Features:
    """Return the features, zero for images of other ranks."""
    device = next(model.parameters()).device
    with eval_mode(model), eval_mode(dense or model):
        blank = torch.zeros(1, *(model.config.image_size or ()), device=device)
        width = pooled_of(_by_positions(model(pixel_values=blank))).shape[1]
        rest = (torch.zeros(images, dtype=kind) for kind in (torch.int64, *2 * (torch.float64,), torch.int64))
        found = Features(torch.zeros(images, width), *rest)
        for positions, pixels, labels, is_replacement in batches:
            pixel_values = normalised(pixels.to(device, non_blocking=True), processor)
            outputs = _by_positions(model(pixel_values=pixel_values))
            found.pooled[positions] = pooled_of(outputs).float().cpu()
            if labels.ndim == 1:  # neighbours vote for one class
                found.labels[positions] = labels
            found.broken[positions] = is_replacement.long()
            if dense is not None:
                wanted = _by_positions(dense(pixel_values=pixel_values))
                found.cosines[positions] = _cosine(pooled_of(outputs), pooled_of(wanted))
                if outputs[0].shape[1] > 1:
                    found.position_cosines[positions] = _cosine(outputs[0], wanted[0]).mean(1)
    return found


def _by_positions(output: HeldOutput) -> list[Tensor]:
    """Return each output, (B, C), (B, N, C) or (B, C, H, W), as (B, positions, C)."""
    return [
        value.flatten(2).mT if value.ndim == 4 else value.reshape(len(value), -1, value.shape[-1])
        for value in output.outputs or ()
    ]


def pooled_of(outputs: list[Tensor]) -> Tensor:
    """Return one vector for each image, (B, C): the last output of one position, or the mean of the first one."""
    single = [value[:, 0] for value in outputs if value.shape[1] == 1]
    return single[-1] if single else outputs[0].mean(1)


def _cosine(found: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(found.double(), wanted.double(), dim=-1).cpu()
