"""Image feature extraction: scored without labels, measured by the features of the dense network."""

from typing import Any

import torch

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.evaluation.features import evaluate_features
from isoprune_hf.tasks.label_free import LabelFree
from isoprune_hf.tasks.task import Answer, Wording


def _ask(extract: Any, image: Any) -> str:
    return f"features of the shape {list(torch.tensor(extract(image)).shape)}"


IMAGE_FEATURE_EXTRACTION = LabelFree(
    form=task_forms.IMAGE_FEATURE_EXTRACTION,
    annotations=("classes",),
    figures=("cosine", "position_cosine", "knn"),
    wording=Wording(
        verb="extract",
        output="features, as wide as those of the base (image-feature-extraction)",
        measured="Cosine similarity of the features with those of the base (pooled, and at every position), and class "
        "by the 20 nearest other images (k-NN)",
        quality="The likeness of the features",
        answer=Answer("outputs", "", "print(outputs.last_hidden_state.shape)"),
    ),
    compare=evaluate_features,
    ask=_ask,
)
