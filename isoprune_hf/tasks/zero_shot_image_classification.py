"""Zero-shot image classification: the tower of images is pruned, measured by its embeddings in the dense network."""

from typing import Any

from isoprune_hf.checkpoint import task_forms
from isoprune_hf.evaluation.features import evaluate_features
from isoprune_hf.tasks.label_free import LabelFree
from isoprune_hf.tasks.task import Answer, Wording

_LABELS = ["animal", "object"]


def _ask(match: Any, image: Any) -> str:
    found = match(image, candidate_labels=_LABELS)
    return ", ".join(f"{answer['label']} {answer['score']:.3f}" for answer in found)


ZERO_SHOT_IMAGE_CLASSIFICATION = LabelFree(
    form=task_forms.ZERO_SHOT_IMAGE_CLASSIFICATION,
    annotations=("classes",),
    figures=("cosine", "knn"),
    wording=Wording(
        verb="match",
        output="how well an image fits each of some texts (zero-shot-image-classification)",
        measured="Cosine similarity of the embeddings of images with those of the base, and class by the 20 nearest "
        "other images (k-NN)",
        quality="The likeness of the embeddings of images",
        answer=Answer("outputs", "", "print(outputs.image_embeds.shape)"),
    ),
    compare=evaluate_features,
    ask=_ask,
)
