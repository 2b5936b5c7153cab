"""`Criterion`: what every importance criterion implements, with the types of its argument and of its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock

Reduction = Literal["sum", "mean"]
Values = Mapping[str, torch.Tensor]  # parameter -> values of its elements, of its shape


@dataclass(frozen=True, eq=False)
class ScoringTask:
    """The argument of a criterion: a model, what to score in it, and how.

    Args:
        criterion: Name of the criterion, for messages.
        model: The base, in float32 if the criterion reads images. A criterion restores its mode, gradients and
            buffers.
        groups: Groups to score.
        blocks: Residual blocks to score.
        weights: Parameters of the groups and blocks, in float32; without those of BatchNorm if `score_batchnorm` is
            false.
        batchnorm: Names among them that belong to BatchNorm.
        calibration: Images, for criteria that read them; without batches for the others.
        seed: Seed for random numbers.
        reduction: How the members of a channel are combined.
        score_batchnorm: The parameters of BatchNorm are scored, too.
    """

    criterion: str
    model: IsoPruneForImageClassification
    groups: Sequence[CoupledGroup]
    blocks: Sequence[ResidualBlock]
    weights: Values
    batchnorm: frozenset[str]
    calibration: Calibration
    seed: int
    reduction: Reduction
    score_batchnorm: bool


class UnscoredError(RecipeError):
    """A group or block has nothing that a criterion scores.

    Args:
        message: The message.
        missing: What the group or block lacks, such as `BatchNorm`.
    """

    def __init__(self, message: str, missing: str):
        super().__init__(message)
        self.missing = missing


class RawScores(NamedTuple):
    """The result of a criterion.

    Args:
        groups: Group -> scores of shape (channels,); float64, except for random numbers.
        blocks: Residual block -> its score.
        unscored: Group or block that has nothing that the criterion scores -> what it lacks.
    """

    groups: dict[str, torch.Tensor]
    blocks: dict[str, float]
    unscored: dict[str, str]


class Criterion(Protocol):
    """An importance criterion; channels with low scores are removed first.

    Attributes:
        name: Its name in recipes (`recipes.Criterion`).
        reads_images: `task.calibration` must have batches.
        in_loss_units: Scores are losses in nats, so they compare across groups as they are.
    """

    @property
    def name(self) -> str: ...

    @property
    def reads_images(self) -> bool: ...

    @property
    def in_loss_units(self) -> bool: ...

    def score(self, task: ScoringTask) -> RawScores:
        """Score all groups and blocks of a task.

        Raises:
            RecipeError: There is no image, or a setting of the task contradicts the criterion.
        """
