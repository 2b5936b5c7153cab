"""Mean average precision of the boxes that a network finds: `BoxPrecision` of a split, `box_figures` of boxes."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import BaseImageProcessor

from isoprune_hf.data.boxes import ObjectReader, Objects, original_size
from isoprune_hf.data.dataset import with_encoded_images
from isoprune_hf.data.decoding import Decoding, Rows
from isoprune_hf.errors import DatasetError
from isoprune_hf.extras import require_package

_USER = "the mean average precision of boxes"
_COLUMNS = 7  # of a box that was found: place of the image, class, score, and four corners


class FoundBoxes(NamedTuple):
    """The boxes that a network finds in an image.

    Args:
        boxes: Corners in pixels of the original image, (N, 4).
        classes: (N,).
        scores: (N,).
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor


class BoxPrecision:
    """Collects the boxes that a network finds in the images of this rank, for `figures`.

    Args:
        objects: Reads the objects of the images of a split.
        rows: The images.
        processor: Makes boxes of the outputs of the model, by its `post_process_object_detection`.
        decoding: How the images are read.

    Raises:
        MissingExtraError: A package for the precision is not installed.
        DatasetError: The processor makes no boxes, or images of which parts are missing or added.
    """

    def __init__(self, objects: ObjectReader, rows: Rows, processor: BaseImageProcessor, decoding: Decoding):
        for package in ("pycocotools", "torchmetrics"):
            require_package(package, _USER)
        post_process = getattr(processor, "post_process_object_detection", None)
        if post_process is None:
            raise DatasetError(
                f"data: boxes need an image processor with post_process_object_detection, got "
                f"{type(processor).__name__}; leave the column of the boxes out, or pass the one of the base"
            )
        if getattr(processor, "do_center_crop", False) or getattr(processor, "pad_size", None):
            raise DatasetError(
                "data: boxes are compared in whole images, and the image processor crops or pads them "
                "(do_center_crop, pad_size); leave the column of the boxes out, or change the processor"
            )
        self._post_process = post_process
        self._reader = objects
        self._rows = with_encoded_images(rows)
        self._decoding = decoding
        self._is_read = torch.zeros(len(objects))
        self._found = [torch.zeros(0, _COLUMNS)]

    def add(self, places: Sequence[int], outputs: Sequence[Tensor]) -> None:
        """Add the boxes of images.

        Args:
            places: Positions of the images, (B,).
            outputs: Logits (B, Q, C) and boxes (B, Q, 4) of the network.

        Raises:
            DatasetError: An object of the images is none, see `ObjectReader`.
        """
        if not places:
            return
        sizes = [original_size(self._rows, place, self._decoding) for place in places]
        for place, size in zip(places, sizes, strict=True):
            self._reader.read(place, size)
        answer = SimpleNamespace(logits=outputs[0].float(), pred_boxes=outputs[1].float())
        targets = torch.tensor(sizes, device=outputs[0].device)
        for place, found in zip(places, self._post_process(answer, 0.0, targets), strict=True):
            columns = (torch.full_like(found["scores"], place), found["labels"], found["scores"])
            self._found.append(torch.cat([torch.stack(columns, 1), found["boxes"]], 1).cpu())
        self._is_read[list(places)] = 1

    def figures(self, accelerator: Accelerator | None) -> dict[str, float]:
        """Return `box_figures` of the images that all ranks have added, the same on every rank."""
        found, is_read = torch.cat(self._found), self._is_read
        if accelerator is not None and accelerator.num_processes > 1:
            is_read = accelerator.reduce(is_read.to(accelerator.device), reduction="sum").cpu()
            padded = accelerator.pad_across_processes(found.to(accelerator.device), pad_index=-1)
            found = accelerator.gather(padded).cpu()
        places = is_read.nonzero()[:, 0].tolist()
        # Equal scores keep the order of the queries.
        parts = (found[found[:, 0] == place] for place in places)
        boxes = [FoundBoxes(part[:, 3:], part[:, 1].long(), part[:, 2]) for part in parts]
        return box_figures(boxes, [self._reader.read(place) for place in places])


def box_figures(found: Sequence[FoundBoxes], wanted: Sequence[Objects]) -> dict[str, float]:
    """Compute the figures of the boxes that were found in images.

    Returns:
        `box_map`: the mean of the average precision over the classes that are wanted and the least overlaps 0.5, 0.55,
        ... 0.95, and `box_map_50`: that for the overlap 0.5. Empty without a wanted object.

    Source:
        Lin et al., Microsoft COCO: common objects in context, ECCV 2014, and pycocotools: precision at 101 values of
        recall, of the 100 best boxes of each class in an image.
    """
    detection = require_package("torchmetrics.detection", _USER)
    # Every rank has the boxes of all of them, so nothing is to be gathered.
    metric = detection.MeanAveragePrecision(backend="pycocotools", sync_on_compute=False)
    metric.warn_on_many_detections = False
    metric.update(
        [{"boxes": one.boxes, "scores": one.scores, "labels": one.classes} for one in found],
        [{"boxes": one.boxes, "labels": one.classes, "iscrowd": one.is_crowd.long()} for one in wanted],
    )
    computed = metric.compute()
    figures = {f"box_{name}": float(computed[name]) for name in ("map", "map_50")}
    return {} if min(figures.values()) < 0 else figures  # -1 without an object
