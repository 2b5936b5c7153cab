"""Semantic segmentation: scored without labels, measured by masks and by the dense network."""

from typing import Any

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.evaluation.segmentation import evaluate_pixels
from isoprune_hf.tasks.label_free import LabelFree
from isoprune_hf.tasks.task import Answer, Wording


def _ask(segment: Any, image: Any) -> str:
    return ", ".join(part["label"] for part in segment(image))


SEMANTIC_SEGMENTATION = LabelFree(
    form=task_forms.SEMANTIC_SEGMENTATION,
    annotations=("masks",),
    figures=("same_class", "pixel_divergence", "miou", "pixel_accuracy"),
    wording=Wording(
        verb="segment",
        output="classes, of which every pixel has one",
        measured="Mean IoU of the classes and share of right pixels, where there are masks; share of the pixels whose "
        "class is that of the base, and divergence of their probabilities from it",
        quality="The likeness of the classes of pixels",
        answer=Answer("outputs", "", "print(processor.post_process_semantic_segmentation(outputs)[0])"),
    ),
    compare=evaluate_pixels,
    ask=_ask,
)
