"""The benchmark of detection: its scenes have exact boxes, and a network that knows them finds all objects."""

import pytest
import torch
from detection import SHAPES, draw_scenes, measure
from torch import nn
from transformers.modeling_outputs import ModelOutput

pytestmark = pytest.mark.benchmarks


class Knowing(nn.Module):
    """Gives the boxes of images that it was built with, in a number of queries, or the likeliest classes of none."""

    def __init__(self, images: torch.Tensor, truths: list, *, is_blind: bool):
        super().__init__()
        self.answers = {image.numpy().tobytes(): truth for image, truth in zip(images, truths, strict=True)}
        self.is_blind = is_blind

    def forward(self, images: torch.Tensor) -> ModelOutput:
        logits, boxes = torch.full((len(images), 4, len(SHAPES)), -9.0), torch.full((len(images), 4, 4), 0.5)
        for number, image in enumerate(images):
            truth = self.answers[image.numpy().tobytes()]
            for place, (kind, box) in enumerate(zip(truth["class_labels"], truth["boxes"], strict=True)):
                boxes[number, place] = box
                logits[number, place, kind] = -9.0 if self.is_blind else 9.0
        return ModelOutput(logits=logits, pred_boxes=boxes)


def test_scenes_have_exact_boxes() -> None:
    images, truths = draw_scenes(12, seed=5)
    assert images.shape == (12, 3, 64, 64) and images.abs().max() <= 1
    for truth in truths:
        centres, sizes = truth["boxes"].split(2, 1)
        assert 1 <= len(truth["class_labels"]) == len(sizes) <= 3
        assert (centres - sizes / 2 >= 0).all() and (centres + sizes / 2 <= 1).all()
        assert (sizes >= 16 / 64).all() and (sizes < 34 / 64).all()
    again = draw_scenes(12, seed=5)[1]
    assert all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(truths, again, strict=True))


def test_right_answers_find_all_objects() -> None:
    images, truths = draw_scenes(6, seed=5)
    right, blind = (Knowing(images, truths, is_blind=is_blind) for is_blind in (False, True))
    assert measure(right, right, images, truths) == [*["100.0"] * 4, "0.0000"]
    assert measure(blind, right, images, truths)[2:4] == ["0.0", "0.0"]
