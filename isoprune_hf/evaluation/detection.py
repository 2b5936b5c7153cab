"""Compare the objects that a network finds with boxes and with the dense network: call `evaluate_objects`."""

import logging
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou
from transformers import BaseImageProcessor

from isoprune_hf.data.annotations import divide_annotations
from isoprune_hf.data.boxes import ObjectReader
from isoprune_hf.data.columns import OBJECTS
from isoprune_hf.data.decoding import Rows
from isoprune_hf.data.labels import classes_of
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import MissingExtraError
from isoprune_hf.evaluation.box_precision import BoxPrecision
from isoprune_hf.evaluation.comparing import compare_outputs
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.detection_loss import DetectionLoss
from isoprune_hf.models.held import HeldModel

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

_LIKELY = 0.5  # least probability of an object that counts, as in the pipeline of transformers
_OVERLAP = 0.5  # least intersection over union of two boxes of one object


def evaluate_objects(
    model: HeldModel,
    dense: nn.Module | None,
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    *,
    accelerator: Accelerator | None = None,
) -> Figures:
    """Compute how near the objects that a network finds are to boxes, and to those of the dense base.

    Args:
        model: Gives logits of classes and boxes for queries, on its current device.
        dense: The dense network, on the same device; None if the model is the dense one, or it is not known.
        split: Images with the columns `image` and `label`, which is not looked at, and `OBJECTS` if there are boxes.
        processor: Makes the pixel values.
        options: How the images are loaded.
        accelerator: The ranks that share the work. All must call this with the same split.

    Returns:
        `same_objects`: mean share of the objects that both have found, and `detection_divergence`: mean divergence of
        `DetectionLoss`, in nats; both without `dense` left out. With boxes those of `box_figures`, of all boxes that
        the image processor makes of the outputs; they are left out, with a warning, if a package for them is not
        installed. `images`, and `broken` if images could not be read.

    Raises:
        DatasetError: An image cannot be read, or more images than the policy allows, or boxes do not fit.
    """
    objective = DetectionLoss(model.config.num_labels or 1)

    def same_objects(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        pairs = zip(objects_of(objective, outputs), objects_of(objective, wanted), strict=True)
        return torch.tensor([share_of_same(*found, *target) for found, target in pairs], dtype=torch.float64)

    rows, objects = divide_annotations(split, OBJECTS)
    precision = None
    if objects is not None:
        try:
            reader = ObjectReader(objects, classes_of(model.config))
            precision = BoxPrecision(reader, rows, processor, options.decoding)
        except MissingExtraError as error:
            logger.warning(f"data: the boxes of the images are not looked at: {error}")
    figures = compare_outputs(
        model,
        dense,
        rows,
        processor,
        options,
        {"same_objects": same_objects, "detection_divergence": objective.distances},
        accelerator=accelerator,
        visit=None if precision is None else precision.add,
    )
    return figures if precision is None else {**figures, **precision.figures(accelerator)}


def share_of_same(boxes: Tensor, classes: Tensor, wanted_boxes: Tensor, wanted_classes: Tensor) -> float:
    """Return the share of the objects of two networks in an image that both have found; 1 if neither has found any.

    Each box, the likeliest ones first, is paired with the free one of its class that overlaps it most, by at least one
    half of their union.

    Args:
        boxes: Corners of boxes, (N, 4), in the order of their probabilities.
        classes: Their classes, (N,).
        wanted_boxes: Corners of the boxes of the dense network, (M, 4).
        wanted_classes: Their classes, (M,).

    Returns:
        Twice the number of pairs over N + M, the F1 score.
    """
    if not len(boxes) + len(wanted_boxes):
        return 1.0
    overlaps = box_iou(boxes, wanted_boxes) * (classes[:, None] == wanted_classes)
    pairs = 0
    for row in range(len(boxes) if len(wanted_boxes) else 0):
        best = int(overlaps[row].argmax())
        if overlaps[row, best] >= _OVERLAP:
            overlaps[:, best] = 0
            pairs += 1
    return 2 * pairs / (len(boxes) + len(wanted_boxes))


def objects_of(objective: DetectionLoss, outputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return for each image the corners of the likely boxes, (N, 4), and their classes (N,), the likeliest first."""
    found = objective.found(outputs)
    scores, classes = found.probabilities.max(2)
    corners = box_convert(found.boxes, "cxcywh", "xyxy")
    chosen = []
    for score, kinds, boxes in zip(scores, classes, corners, strict=True):
        order = score.argsort(descending=True)
        order = order[score[order] >= _LIKELY]
        chosen.append((boxes[order], kinds[order]))
    return chosen
