"""Pixels of masks are counted by class; mean IoU and accuracy are those of all pixels of all images."""

import pytest
import torch

from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.masks import classes_at, count_pixels, mask_figures


def test_pixels_are_counted_by_both_classes() -> None:
    wanted = torch.tensor([[0, 0, 1], [2, 255, 1]])
    found = torch.tensor([[0, 1, 1], [0, 2, 1]])
    assert count_pixels(found, wanted, 3).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert count_pixels(found[0], wanted[0], 2, ignored=1).tolist() == [[1, 1], [0, 0]]


def test_figures_are_over_all_pixels() -> None:
    counts = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    figures = mask_figures(counts)
    # Classes 2 and 3 are nowhere, and are left out.
    assert figures["miou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert figures["pixel_accuracy"] == pytest.approx(9 / 12)
    assert mask_figures(torch.zeros(2, 2, dtype=torch.int64)) == {}


def test_class_that_is_only_found_counts_as_missed() -> None:
    assert mask_figures(torch.tensor([[3, 1], [0, 0]]))["miou"] == pytest.approx((3 / 4 + 0) / 2)


def test_class_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(DatasetError, match="classes 0 to 7, and the model has 3"):
        count_pixels(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 7]), 3)


def test_logits_are_resized_before_classes_are_chosen() -> None:
    logits = torch.tensor([[[0.0, 3.0]], [[1.0, 0.0]]])  # two classes of two pixels in a row
    assert classes_at(logits, torch.Size((1, 2))).tolist() == [[1, 0]]
    # A quarter of the way from (0, 1) to (3, 0) the logits are 0.75 and 0.75: the first class.
    assert classes_at(logits, torch.Size((2, 4))).tolist() == [[1, 0, 0, 0]] * 2
