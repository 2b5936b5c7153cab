"""The importance criteria by name; the names themselves are `recipes.Criterion`, from which recipes are checked."""

from collections.abc import Mapping
from types import MappingProxyType

from isoprune_hf.pruning.scoring.criteria.activation_variance import ActivationVariance
from isoprune_hf.pruning.scoring.criteria.bn_scale import BatchNormScale
from isoprune_hf.pruning.scoring.criteria.criterion import Criterion
from isoprune_hf.pruning.scoring.criteria.fpgm import GeometricMedian
from isoprune_hf.pruning.scoring.criteria.gate_fisher import GateFisher, GateFisherJoint
from isoprune_hf.pruning.scoring.criteria.hessian import Hessian
from isoprune_hf.pruning.scoring.criteria.l1 import L1
from isoprune_hf.pruning.scoring.criteria.l2 import L2
from isoprune_hf.pruning.scoring.criteria.lamp import Lamp
from isoprune_hf.pruning.scoring.criteria.random import Random
from isoprune_hf.pruning.scoring.criteria.reference import HessianReference, TaylorReference
from isoprune_hf.pruning.scoring.criteria.taylor import TAYLOR, TAYLOR_L2
from isoprune_hf.pruning.scoring.criteria.trial_loss import TrialLoss

_ALL: tuple[Criterion, ...] = (
    TAYLOR,
    TAYLOR_L2,
    TaylorReference(),
    Hessian(),
    HessianReference(),
    GateFisher(),
    GateFisherJoint(),
    TrialLoss(),
    ActivationVariance(),
    L1(),
    L2(),
    BatchNormScale(),
    GeometricMedian(),
    Lamp(),
    Random(),
)
CRITERIA: Mapping[str, Criterion] = MappingProxyType({criterion.name: criterion for criterion in _ALL})
