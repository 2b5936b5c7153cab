"""The allocators by their recipe value; to add one, write a module with an `Allocator` and register it here."""

from collections.abc import Mapping

from isoprune_hf.pruning.deciding.by_class import allocate_by_class
from isoprune_hf.pruning.deciding.knapsack import allocate_knapsack
from isoprune_hf.pruning.deciding.solution import Allocator

ALLOCATORS: Mapping[str, Allocator] = {"class": allocate_by_class, "knapsack": allocate_knapsack}
