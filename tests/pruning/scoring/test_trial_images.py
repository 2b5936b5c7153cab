"""The images that judge trial cuts are the same, in the same micro-batches, on any number of ranks."""

import torch

from isoprune_hf.pruning.partial_passes.passes import Images
from isoprune_hf.pruning.scoring.trial_images import TrialImages


def test_judging_images_keep_their_micro_batches() -> None:
    aside = [(number, torch.full((2, 1), float(number))) for number in range(4)]
    alone = TrialImages(Images([]), aside, total=32, held=8, batches=4)
    ranks = [alone._replace(aside=aside[rank::2]) for rank in range(2)]
    for judges, sizes in ((8, [2, 2, 2, 2]), (6, [2, 1, 2, 1]), (2, [1, 1])):
        expected = [part.flatten().tolist() for part in alone.judging(judges).parts]
        assert [len(part) for part in expected] == sizes
        found = [part.flatten().tolist() for rank in ranks for part in rank.judging(judges).parts]
        assert sorted(found) == sorted(expected)
