"""`random`: uniform random numbers, a baseline for every other criterion."""

import torch

from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, ScoringTask


class Random:
    """Uniform numbers from a seed: first for the groups, then for the blocks, in their order."""

    name = "random"
    reads_images = False
    in_loss_units = False

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task."""
        generator = torch.Generator().manual_seed(task.seed)
        scores = {group.name: torch.rand(group.channels, generator=generator) for group in task.groups}
        blocks = {block.name: torch.rand((), generator=generator).item() for block in task.blocks}
        return RawScores(scores, blocks, {})
