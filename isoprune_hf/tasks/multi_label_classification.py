"""Image classification with a list of classes for each image: measured by mean average precision and loss."""

from pathlib import Path
from typing import Any

from transformers import pipeline

from isoprune_hf.tasks.image_classification import ImageClassification
from isoprune_hf.tasks.task import Answer, Wording


class MultiLabelClassification(ImageClassification):
    """See `Task`; the labels are lists of classes, and each class has a probability of its own."""

    figures = ("map", "loss")
    wording = Wording(
        verb="classify",
        output="classes, each with a probability of its own",
        measured="Mean average precision over the classes, and binary cross-entropy (mean over classes and images)",
        quality="Mean average precision",
        answer=Answer(
            "logits",
            ".logits",
            "for index, probability in enumerate(logits.sigmoid()[0].tolist()):\n"
            "    print(model.config.id2label[index], round(probability, 3))",
        ),
    )

    def try_pipeline(self, folder: Path, image: Any, truth: str | None) -> str:
        """Find the classes of the image."""
        answers = pipeline("image-classification", model=str(folder))(image)
        found = ", ".join(f"{answer['label']} ({answer['score']:.2f})" for answer in answers if answer["score"] > 0.5)
        return f"pipeline on a held-out image: {found or 'no class'}, truth {truth or 'no class'}"


MULTI_LABEL_CLASSIFICATION = MultiLabelClassification()
