"""The traces that forward passes leave in modules are undone."""

import copy
from collections import deque
from collections.abc import Callable

import pytest
import torch
from helpers.odd_networks import calibration_batches, open_odd
from torch import Tensor, nn

from isoprune_hf import PruneRecipe, prune_model
from isoprune_hf.pruning.calibration import pass_state
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.calibration.pass_state import undoing_passes


class Keeper(nn.Module):
    """Keeps its last outputs in every kind of container, counts, and writes two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.maps: list[Tensor] = []
        self.nested: dict[str, list[Tensor]] = {"maps": []}
        self.queue: deque[Tensor] = deque()
        self.last: Tensor | None = None
        self.calls = 0
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + sum(self.maps)
        self.maps.append(y)
        self.nested["maps"].append(y)
        self.nested["more"] = [y]
        self.queue.append(y)
        self.last = self.late = y
        self.calls += 1
        self.written += 1
        self.replaced = y.detach().mean(0)
        return y


def assert_untouched(keeper: Keeper) -> None:
    assert keeper.maps == [] and keeper.nested == {"maps": []} and not keeper.queue
    assert keeper.last is None and keeper.calls == 0 and not hasattr(keeper, "late")
    assert not keeper.written.any() and not keeper.replaced.any()


def test_each_pass_begins_with_the_state_before() -> None:
    keeper, x = Keeper(), torch.randn(2, 3)
    maps, written = keeper.maps, keeper.written
    expected = keeper.layer(x)
    with undoing_passes(keeper):
        for _ in range(2):  # a second backward pass would meet the graph of the first
            output = keeper(x)
            assert torch.equal(output, expected)
            output.sum().backward()
        assert keeper.calls == 1
    assert keeper.maps is maps and keeper.written is written
    assert_untouched(keeper)


def test_buffer_written_between_passes_keeps_the_values() -> None:
    keeper, x = Keeper(), torch.randn(2, 3)
    written = keeper.written
    with undoing_passes(keeper):
        keeper(x)
        keeper.written.add_(5)
        keeper(x)
    assert keeper.written is written and torch.equal(written, torch.full((3,), 5.0))


def test_state_is_undone_after_an_error() -> None:
    keeper = Keeper()
    with pytest.raises(KeyError), undoing_passes(keeper):
        keeper(torch.randn(2, 3))
        raise KeyError
    assert_untouched(keeper)


def test_parameters_and_modes_may_change_within() -> None:
    keeper = Keeper().train()
    keeper.layer.eval()
    with undoing_passes(keeper):
        assert keeper.training and not keeper.layer.training
        keeper.layer.bias = nn.Parameter(torch.ones(3))
        keeper.layer.train()
        keeper(torch.randn(2, 3))
    assert keeper.layer.bias.sum() == 3 and keeper.layer.training


class Changed(nn.Module):
    """Each pass calls a function with the module."""

    def __init__(self, change: Callable[["Changed"], None]) -> None:
        super().__init__()
        self.change, self.one, self.table = change, 1, {"first": 1}

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return x


def rename(module: Changed) -> None:
    module.other = module.table
    del module.table


def replace_by_an_equal_value(module: Changed) -> None:
    module.one = True


def rename_in_container(module: Changed) -> None:
    module.table["second"] = module.table.pop("first")


@pytest.mark.parametrize("change", [rename, replace_by_an_equal_value, rename_in_container])
def test_changes_that_look_alike_are_undone(change: Callable[[Changed], None]) -> None:
    module = Changed(change)
    before, names = dict(vars(module)), list(vars(module))
    with undoing_passes(module):
        for _ in range(2):
            module(torch.zeros(1))
    assert vars(module).keys() == before.keys() and module.table == {"first": 1}
    assert all(vars(module)[name] is before[name] for name in names)


def test_unchanged_modules_are_not_searched() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(20)))
    with undoing_passes(blocks):
        blocks.eval()
        searched = []
        for _ in range(3):
            before = pass_state._is_plain.cache_info().hits
            blocks(torch.zeros(2, 3))
            searched.append(pass_state._is_plain.cache_info().hits - before)
    assert searched[1:] == [0, 0]


@pytest.mark.parametrize("name", ["keeps_maps", "caches_bias", "writes_in_place"])
@pytest.mark.parametrize(
    "recipe",
    [PruneRecipe(target_macs="50%", round_to=1), PruneRecipe(target_macs="50%", round_to=1, criterion="taylor")],
)
def test_model_used_before_is_pruned_alike(name: str, recipe: PruneRecipe) -> None:
    fresh, used = open_odd(name).model, open_odd(name).model
    batches = calibration_batches(3)
    used(batches[0][0])  # leaves tensors of this pass, with their graph
    kept = {path: copy.copy(vars(module)) for path, module in used.named_modules()}
    first, second = (prune_model(model, recipe, batches) for model in (fresh, used))
    assert first.plan.kept == second.plan.kept
    with torch.no_grad():
        outputs = [result.model(batches[1][0]).logits for result in (first, second)]
    assert torch.equal(*outputs)
    for path, module in used.named_modules():
        assert vars(module).keys() == kept[path].keys()
        assert all(vars(module)[key] is value for key, value in kept[path].items() if isinstance(value, Tensor))


def test_scoring_mode_undoes_passes() -> None:
    model = open_odd("keeps_maps").model
    with scoring_mode(model, requires_grad=False):
        model(calibration_batches(3)[0][0])
    assert model.model.maps == [] and model.model.last is None


def test_overwritten_buffer_is_cut_to_its_new_shape() -> None:
    model = prune_model(
        open_odd("writes_in_place").model, PruneRecipe(target_macs="50%", round_to=1, criterion="l1")
    ).model
    before = model.model.seen.shape
    with torch.no_grad():
        model(calibration_batches(3)[0][0])
    assert model.model.seen.shape == before == (model.model.conv1.out_channels,)
