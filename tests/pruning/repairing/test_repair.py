"""The registry of repairs, and a repair without calibration images."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from helpers.marks import one_of_each
from helpers.plain_scores import batches_of
from helpers.tiny_models import make_base

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.calibration import Batch, Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.partial_passes import storage
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.repair import repair
from isoprune_hf.pruning.repairing.repairs.registry import REPAIRS
from isoprune_hf.pruning.repairing.rotation import Rotated
from isoprune_hf.recipes import PruneRecipe


def test_recipes_and_registry_name_the_same_repairs() -> None:
    allowed = next(part for part in get_args(get_type_hints(PruneRecipe)["reconstruct"]) if get_args(part))
    assert set(REPAIRS) == set(get_args(allowed))
    assert [name for name, method in REPAIRS.items() if not method.reads_images] == ["none"]


@pytest.mark.parametrize("name", [name for name in REPAIRS if name != "none"])
def test_repair_without_calibration_is_refused(name: str, tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    groups = trace_groups(model)
    plan = PruningPlan({"layer1.0.conv1": (0, 1)}, {})
    pruned = apply_plan(model, plan, groups)
    before = {key: value.clone() for key, value in pruned.state_dict().items()}
    with pytest.raises(RecipeError, match=r"prune\.reconstruct"):
        repair(Rotated(model, (), ()), pruned, plan, groups, name)
    assert repair(Rotated(model, (), ()), pruned, plan, groups, "none") == ()
    assert all(torch.equal(pruned.state_dict()[key], value) for key, value in before.items())


class Loader:
    """Micro-batches that count how often they are read."""

    def __init__(self, batches: list[Batch]):
        self.batches, self.read = batches, 0

    def __iter__(self) -> Iterator[Batch]:
        self.read += 1
        yield from self.batches


@pytest.mark.parametrize("name", one_of_each([name for name in REPAIRS if name != "none"], "bn", "bias"))
def test_images_are_read_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base("resnet", tmp_path)
    groups = trace_groups(model)
    plan = PruningPlan({"layer1.0.conv1": (0, 1)}, {})
    weights = []
    for memory in ((2**40, 2**40), (0, 2**40)):  # the images are held in memory, or in files
        monkeypatch.setattr(storage, "free_memory", lambda device, memory=memory: memory)
        loader, pruned = Loader(batches_of(model, [12, 8])), apply_plan(model, plan, groups)
        repair(Rotated(model, (), ()), pruned, plan, groups, name, Calibration(loader))
        assert loader.read == 1
        weights.append(pruned.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
