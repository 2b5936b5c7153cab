"""One call prunes any module; what its channels are is known by hand."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from isoprune_hf import Pruned, prune
from isoprune_hf.errors import BudgetError, DatasetError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.measuring.onnx_profile import LayerTimes
from isoprune_hf.measuring.timing import Passes, Timing
from isoprune_hf.recipes.presets import Criterion, DataCriterion, LossCriterion, WeightCriterion

DEAD = (1, 2, 5)
CRITERIA = [name for kind in (LossCriterion, DataCriterion, WeightCriterion) for name in get_args(kind)]


class TwoLayers(nn.Module):
    """Eight hidden channels between a convolution and a linear layer; those in `DEAD` are zero on both sides."""

    def __init__(self, channels: int = 3, classes: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(0.5, 1.5, 8))
            for tensor in (self.conv.weight, self.conv.bias, self.norm.weight, self.norm.bias, self.head.weight.T):
                tensor[list(DEAD)] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def make_net(**options: int) -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers(**options)


def make_batches(*size: int, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    size = size or (3, 6, 6)
    return [
        (torch.randn(8, *size, generator=generator), torch.randint(classes, (8,), generator=generator))
        for _ in range(2)
    ]


def kept_channels(result: Pruned) -> list[int]:
    return list(result.plan.kept["conv"])


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("random", "activation_variance")])
def test_exactly_the_dead_channels_leave(criterion: Criterion) -> None:
    net, batches = make_net(), make_batches()
    result = prune(net, batches, criterion=criterion, ratio=3 / 8, round_to=1)
    assert kept_channels(result) == [0, 3, 4, 6, 7]
    assert type(result.model) is TwoLayers
    assert result.model.conv.out_channels == result.model.head.in_features == 5
    images = batches[0][0]
    torch.testing.assert_close(result.model(images), net.eval()(images))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_named_criterion_keeps_the_repair(criterion: Criterion) -> None:
    decided = prune(make_net(), make_batches(), criterion=criterion, ratio=3 / 8, round_to=1).plan.settings
    assert (decided["criterion"], decided["rotate"], decided["reconstruct"]) == (criterion, True, "least_squares")


def test_batches_without_targets_repair_cut_by_weights() -> None:
    images = [batch for batch, _ in make_batches()]
    cuts = [prune(make_net(), data, criterion="l1", ratio=0.5, round_to=1) for data in (images, images[0])]
    assert [cut.plan.settings["reconstruct"] for cut in cuts] == ["least_squares", "none"]
    base, *nets = make_net().eval(), *(cut.model for cut in cuts)
    errors = [float((net(images[0]) - base(images[0])).square().mean()) for net in nets]
    assert errors[0] < 0.5 * errors[1]


def test_default_is_half_of_the_macs() -> None:
    result = prune(make_net(), make_batches(), round_to=1)
    # 8 channels of 3 x 9 weights at 36 positions and 4 outputs, of which 4 remain
    assert result.base_cost.macs == 8 * (27 * 36 + 4)
    assert result.pruned_cost.macs == 4 * (27 * 36 + 4)
    assert set(DEAD).isdisjoint(kept_channels(result))


def test_representation_is_one_short_table() -> None:
    result = prune(make_net(), make_batches(), criterion="l1", ratio=3 / 8, round_to=1)
    lines = repr(result).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["TwoLayers", "base", "pruned", "kept"],
        ["MACs", "7.808", "k", "4.88", "k", "62.5%"],  # 8 x 976 and 5 x 976
        ["params", "276", "174", "63.0%"],  # 8 x (27 + 1 + 2 + 4) + 4 and 5 x 34 + 4
        ["conv", "8", "5", "62.5%"],
    ]
    assert len(lines) < 10


@pytest.mark.parametrize("criterion", [None, *CRITERIA])
def test_state_of_the_caller_is_untouched(criterion: Criterion | None) -> None:
    net = make_net()
    calls: list[int] = []
    net.conv.register_forward_hook(lambda *_: calls.append(1))
    net.norm.eval()
    net.head.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(make_batches()[0][0]).sum().backward()
    optimizer.step()
    calls.clear()

    def state() -> list[Any]:
        tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters() if p.grad is not None)]
        return [
            [tensor.numpy().tobytes() for tensor in tensors],
            [(name, id(value), value.requires_grad) for name, value in net.named_parameters()],
            [(module.training, {name: id(value) for name, value in vars(module).items()}) for module in net.modules()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()],
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            copy.deepcopy(optimizer.state_dict()["state"][0]["momentum_buffer"]).tolist(),
        ]

    before = state()
    prune(net, make_batches(), round_to=1, **({} if criterion is None else {"criterion": criterion}))
    assert state() == before
    assert calls == []


@pytest.mark.parametrize("size", [(1, 6, 6), (4, 5, 7), (6, 9, 4)])
def test_inputs_may_have_any_size(size: tuple[int, ...]) -> None:
    result = prune(make_net(channels=size[0]), make_batches(*size), round_to=1)
    assert set(DEAD).isdisjoint(kept_channels(result))
    assert result.base_cost.macs == 8 * (9 * size[0] * size[1] * size[2] + 4)


def test_inputs_may_have_no_height_and_width() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        net[0].weight[[1, 2, 5]] = net[0].bias[[1, 2, 5]] = 0
    result = prune(net, make_batches(5), ratio=3 / 8, round_to=1)
    assert result.plan.kept == {"0": (0, 3, 4, 6, 7)}
    assert result.model[2].in_features == 5


@pytest.mark.parametrize(
    "setting", [{"weights": "a.pth"}, {"num_labels": 7}, {"num_labels": "data"}, {"pretrained": False}]
)
def test_settings_of_names_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(setting))):
        prune(make_net(), make_batches(), criterion="l1", **setting)


def test_name_may_have_own_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model("test_resnet")
    torch.save({"state_dict": module.state_dict()}, tmp_path / "own.pth")
    result = prune("timm/test_resnet", torch.zeros(1, 3, 160, 160), weights=str(tmp_path / "own.pth"), criterion="l1")
    assert torch.equal(result.base.fc.weight, module.fc.weight)
    assert result.config.source["weights"] == str(tmp_path / "own.pth")


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.parallel.DistributedDataParallel, torch.compile])
def test_wrapped_module_is_unwrapped(wrap: Any, process_group: None) -> None:
    result = prune(wrap(make_net()), make_batches(), criterion="l1", ratio=3 / 8, round_to=1)
    assert type(result.model) is TwoLayers
    assert kept_channels(result) == [0, 3, 4, 6, 7]


def test_latency_budget_is_that_of_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(models: dict[str, Any], *_: Any, **__: Any) -> dict[str, float]:
        return {name: float(model.model.conv.out_channels) for name, model in models.items()}

    latency = "isoprune_hf.pruning.cost.latency"

    def fit(variants: Any, *_: Any, **__: Any) -> list[LayerTimes]:
        return [LayerTimes(dict(macs), times({"cut": model})["cut"]) for model, macs in variants]

    @contextmanager
    def against(base: Any, **_: Any) -> Iterator[Callable[[Any], Timing]]:
        def time_pruned(cut: Any) -> Timing:
            widths = times({"base": base, "pruned": cut})
            return Timing({name: Passes((width,), (width,)) for name, width in widths.items()}, None)

        yield time_pruned

    monkeypatch.setattr("isoprune_hf.pruning.pipeline.time_against", against)
    monkeypatch.setattr(f"{latency}.time_in_runtime", fit)
    result = prune(make_net(), make_batches(), target_latency="63%", round_to=1)
    assert kept_channels(result) == [0, 3, 4, 6, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_and_stays(dtype: torch.dtype) -> None:
    net, batches = make_net().to(dtype), [(images.to(dtype), labels) for images, labels in make_batches()]
    result = prune(net, batches, ratio=3 / 8, round_to=1)
    assert kept_channels(result) == [0, 3, 4, 6, 7]
    assert {value.dtype for value in (*result.model.parameters(), *net.parameters())} == {dtype}


def test_result_trains_in_a_plain_loop() -> None:
    net, batches = make_net(), make_batches()
    model = prune(net, batches, round_to=1).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = net.conv.weight.clone()
    losses = []
    for _ in range(5):
        for images, labels in batches:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(net.conv.weight, before)


def test_hook_of_caller_is_left_out() -> None:
    net = make_net()
    net.conv.register_forward_hook(lambda *_: None)
    result = prune(net, make_batches(), criterion="l1", ratio=3 / 8, round_to=1)
    assert not result.model.conv._forward_hooks
    assert "hooks left out: 1" in repr(result)


def test_hooks_that_are_part_of_model_stay() -> None:
    class Doubled(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.head.register_forward_hook(self.double)

        def double(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return 2 * output

    torch.manual_seed(0)
    net, images = Doubled(), make_batches()[0][0]
    result = prune(net, make_batches(), criterion="l1", ratio=3 / 8, round_to=1)
    torch.testing.assert_close(result.model(images), net.eval()(images))
    assert result.model.head._forward_hooks.popitem()[1].__self__ is result.model


def test_dense_weights_are_not_shared_with_result() -> None:
    net = make_net()
    model = prune(net, make_batches(), criterion="l1", ratio=3 / 8, round_to=1).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert all((parameter != 7).all() for parameter in net.parameters())


def test_scores_that_say_nothing_are_refused() -> None:
    net = make_net()
    nn.init.zeros_(net.conv.weight)
    nn.init.zeros_(net.conv.bias)
    nn.init.zeros_(net.norm.weight)
    nn.init.zeros_(net.norm.bias)
    with pytest.raises(RecipeError, match="criterion taylor"):
        prune(net, make_batches(), criterion="taylor", round_to=1)


@pytest.mark.parametrize(
    ("data", "error", "named"),
    [
        (None, RecipeError, "data"),
        (3, DatasetError, "int"),
        ([], DatasetError, "no batch"),
        ([torch.zeros(2, 3, 6, 6, dtype=torch.uint8)], DatasetError, "uint8"),
        ([{"x": torch.zeros(2, 3, 6, 6)}], DatasetError, "x"),
        ([(torch.zeros(2, 3, 6, 6), torch.zeros(2), torch.zeros(2))], DatasetError, "3"),
        ([(torch.zeros(2, 5, 6, 6), torch.zeros(2, dtype=torch.int64))], UnsupportedArchitectureError, "TwoLayers"),
    ],
)
def test_data_of_another_form_is_refused(data: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        prune(make_net(), data)


def test_module_without_parameters_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="Flatten"):
        prune(nn.Flatten(), make_batches())


def test_module_without_groups_is_refused() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(UnsupportedArchitectureError, match="no channels"):
        prune(net, make_batches(5), round_to=1)


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = self.first
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu() + self.second(x).tanh())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.cells = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.embed(x).relu())[0][:, -1])


@pytest.mark.parametrize("criterion", [None, "hessian", "gate_fisher", "gate_fisher_joint"])
@pytest.mark.parametrize(("kind", "size"), [(TwoNames, (5,)), (Recurrent, (3, 5))])
def test_shared_and_recurrent_layers_are_untouched(kind: Any, size: tuple[int, ...], criterion: str | None) -> None:
    torch.manual_seed(0)
    net, batches = kind(), make_batches(*size)

    def state() -> list[Any]:
        return [
            [(name, id(value)) for name, value in net.named_parameters(remove_duplicate=False)],
            [(name, id(part), sorted(vars(part))) for name, part in net.named_modules(remove_duplicate=False)],
            [id(weight) for part in net.modules() if isinstance(part, nn.LSTM) for weight in part._flat_weights],
            net(batches[0][0]).tolist(),
        ]

    before = state()
    result = prune(net, batches, round_to=1, **({} if criterion is None else {"criterion": criterion}))
    assert state() == before
    assert result.pruned_cost.macs <= 0.5 * result.base_cost.macs
    assert result.model(batches[0][0]).shape == (8, 4)


def test_module_of_torchscript_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="TorchScript"):
        prune(torch.jit.script(nn.Linear(3, 4)), make_batches())


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [({"ratoi": 0.5}, RecipeError, "ratoi"), ({"target_macs": "1"}, BudgetError, "target_macs")],
)
def test_unusable_setting_is_refused(settings: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        prune(make_net(), make_batches(), criterion="l1", **settings)
