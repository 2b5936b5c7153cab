"""The repairs by name; the names themselves are the values of `prune.reconstruct`, from which recipes are checked."""

from collections.abc import Mapping
from types import MappingProxyType

from isoprune_hf.pruning.repairing.repairs.batchnorm import BatchNormRepair
from isoprune_hf.pruning.repairing.repairs.bias import BiasRepair
from isoprune_hf.pruning.repairing.repairs.least_squares import LeastSquaresRepair
from isoprune_hf.pruning.repairing.repairs.none import NoRepair
from isoprune_hf.pruning.repairing.repairs.task import Repair

_ALL: tuple[Repair, ...] = (NoRepair(), BatchNormRepair(), BiasRepair(), LeastSquaresRepair())
REPAIRS: Mapping[str, Repair] = MappingProxyType({repair.name: repair for repair in _ALL})
