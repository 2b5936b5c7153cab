"""`Repair`: what every repair of a cut model implements, with the type of its argument."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.graph.output_masks import OutputMasks


@dataclass(frozen=True, eq=False)
class RepairTask:
    """The argument of a repair.

    Args:
        dense: The network before the cut; left untouched.
        pruned: The cut network, which a repair changes in place.
        masks: (parameter, dim) -> which of its elements were kept.
        factors: Weight -> factors for the dense outputs of its layer, one for each that was kept.
        calibration: Images.
        outputs: Layer -> for each call, dim of its output -> which of its elements were kept; empty if not known.
        selecting: Modules whose code selects by values what the layers in them read.
    """

    dense: IsoPruneForImageClassification
    pruned: IsoPruneForImageClassification
    masks: Mapping[tuple[str, int], np.ndarray]
    factors: Mapping[str, torch.Tensor]
    calibration: Calibration
    outputs: OutputMasks = field(default_factory=dict)
    selecting: frozenset[str] = frozenset()


class Repair(Protocol):
    """A change of a cut network that brings it nearer to the dense one, without labels.

    Attributes:
        name: Its value of the setting `prune.reconstruct`.
        reads_images: It changes weights or statistics by means of images; false only if it changes nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def reads_images(self) -> bool: ...

    def repair(self, task: RepairTask) -> tuple[str, ...]:
        """Repair `task.pruned`, in place.

        Returns:
            One line for each thing that could not be repaired.

        Raises:
            RecipeError: There is no image.
        """
