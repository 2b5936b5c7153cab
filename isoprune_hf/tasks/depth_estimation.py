"""Depth estimation: scored without labels, measured by the depths of the dense network."""

from functools import partial
from typing import Any

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.evaluation.comparing import compare_outputs
from isoprune_hf.evaluation.depth import DEPTH_MEASURES
from isoprune_hf.tasks.label_free import LabelFree
from isoprune_hf.tasks.task import Answer, Wording


def _ask(estimate: Any, image: Any) -> str:
    return f"depths of the shape {list(estimate(image)['predicted_depth'].shape)}"


DEPTH_ESTIMATION = LabelFree(
    form=task_forms.DEPTH_ESTIMATION,
    annotations=(),
    figures=("delta1", "depth_difference"),
    wording=Wording(
        verb="estimate",
        output="the depth of every pixel",
        measured="Share of the pixels whose depth is less than 1.25 times off that of the base, and mean difference "
        "of the depths relative to their mean",
        quality="The likeness of the depths",
        answer=Answer("outputs", "", "print(outputs.predicted_depth.shape)"),
    ),
    compare=partial(compare_outputs, measures=DEPTH_MEASURES),
    ask=_ask,
)
