"""Objects of two networks are paired by class and overlap."""

import torch

from isoprune_hf.evaluation.detection import share_of_same


def test_objects_are_paired_once_by_class_and_overlap() -> None:
    wanted = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.6, 0.2, 0.8]])
    found = torch.tensor(
        [
            [0.0, 0.0, 0.4, 0.3],  # three quarters of the first one
            [0.0, 0.0, 0.4, 0.4],  # the first one again
            [0.5, 0.5, 0.9, 0.9],  # of another class
            [0.1, 0.6, 0.3, 0.8],  # a third of the union
        ]
    )
    share = share_of_same(found, torch.tensor([0, 0, 0, 2]), wanted, torch.tensor([0, 1, 2]))
    assert share == 2 * 1 / (4 + 3)
    assert share_of_same(wanted, torch.tensor([0, 1, 2]), wanted, torch.tensor([0, 1, 2])) == 1


def test_images_without_objects_agree() -> None:
    none, one = torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    no_class, a_class = torch.zeros(0, dtype=torch.long), torch.tensor([1])
    assert share_of_same(none, no_class, none, no_class) == 1
    assert share_of_same(one, a_class, none, no_class) == share_of_same(none, no_class, one, a_class) == 0
