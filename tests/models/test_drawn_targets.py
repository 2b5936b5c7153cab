"""Targets are drawn for tasks without labels, by the kind of their outputs."""

import pytest
import torch
from torch import nn

from isoprune_hf.checkpoint.task_forms import IMAGE_FEATURE_EXTRACTION, SEMANTIC_SEGMENTATION
from isoprune_hf.errors import CheckpointError
from isoprune_hf.models.drawn_targets import DrawnBatches, held, loss_without_labels
from isoprune_hf.models.feature_loss import FEATURES, draw_signs
from isoprune_hf.models.pixel_loss import PIXEL_CLASSES


def test_loss_follows_from_the_kind_of_outputs() -> None:
    assert loss_without_labels(IMAGE_FEATURE_EXTRACTION) is FEATURES
    assert loss_without_labels(SEMANTIC_SEGMENTATION) is PIXEL_CLASSES


def test_batches_have_drawn_targets_for_labels() -> None:
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    class Batches:
        def __iter__(self):
            return self.starting_at(0)

        def __len__(self):
            return 2

        def starting_at(self, number):
            return iter([(images[:2], torch.zeros(2)), (images[2:], torch.zeros(2))][number:])

    shapes = [torch.Size((3,))]
    made = DrawnBatches(Batches(), FEATURES, shapes)
    (first, signs), (_, others) = made
    assert len(made) == 2 and torch.equal(first, images[:2]) and torch.equal(signs, draw_signs(first, shapes))
    assert torch.equal(next(made.starting_at(1))[1], others)


def test_network_without_loss_is_refused() -> None:
    with pytest.raises(CheckpointError, match="Linear is not held with a loss"):
        held(nn.Linear(1, 1))
