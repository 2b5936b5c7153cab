"""Object detection: scored without labels, measured by boxes and by the objects of the dense network."""

from typing import Any

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.evaluation.detection import evaluate_objects
from isoprune_hf.tasks.label_free import LabelFree
from isoprune_hf.tasks.task import Answer, Wording


def _ask(detect: Any, image: Any) -> str:
    return ", ".join(f"{one['label']} ({one['score']:.2f})" for one in detect(image)) or "no object"


OBJECT_DETECTION = LabelFree(
    form=task_forms.OBJECT_DETECTION,
    annotations=("boxes",),
    figures=("same_objects", "detection_divergence", "box_map", "box_map_50"),
    wording=Wording(
        verb="detect",
        output="classes, of which every box has one",
        measured="Mean average precision of the boxes (COCO), where there are boxes; share of the objects that the "
        "network and the base both find (F1 of boxes of one class that overlap by half, of probabilities from 0.5), "
        "and divergence of all boxes and classes from those of the base",
        quality="The likeness of the objects found",
        answer=Answer("outputs", "", "print(processor.post_process_object_detection(outputs)[0])"),
    ),
    compare=evaluate_objects,
    ask=_ask,
)
