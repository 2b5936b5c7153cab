"""Passes that start at a waypoint, compared with whole passes: the same bits, and fewer modules run."""

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.marks import one_of_each
from helpers.plain_scores import batches_of
from helpers.tiny_models import ALL_FAMILIES, make_base
from helpers.traced_models import make_timm
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.partial_passes.passes import Images, Passes
from isoprune_hf.pruning.partial_passes.storage import Keep, Storage
from isoprune_hf.pruning.partial_passes.waypoints import Given, find_waypoints, replaced_outputs
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing import fit_layers as fitting
from isoprune_hf.pruning.repairing.layer_calls import find_layers

Model = IsoPruneForImageClassification
EVERYWHERE = 2**40
NEVER = 0


class Room(Storage):
    """Room for so many bytes."""

    def __init__(self, size: int, device: torch.device = torch.device("cpu"), ranks: int = 1):  # noqa: B008
        super().__init__(device, ranks)
        object.__setattr__(self, "size", size)

    def place(self, size: int) -> Keep | None:
        return super().place(0) if size <= self.size else None


def halved(model: Model) -> tuple[Model, dict[tuple[str, int], np.ndarray]]:
    groups = trace_groups(model)
    plan = PruningPlan({g.name: tuple(range(0, g.channels, 2)) for g in groups if not g.num_heads}, {})
    return apply_plan(model, plan, groups), keep_masks(plan, groups, model.model)


def waypoints_of(model: Model) -> dict[str, tuple[str, ...]]:
    """Return for each waypoint the modules before it whose outputs are needed, too."""
    with torch.no_grad():
        layers, _ = find_layers(model, model, {}, {}, {})
        ways = find_waypoints(model, [layer.name for layer in layers]).ways
    assert all(way.held[-1] == way.name for way in ways)
    return {way.name: way.held[:-1] for way in ways}


def test_module_keeps_a_forward_of_its_own(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    block = next(part for part in model.model.modules() if [*part.children()] and part is not model.model)
    name = next(name for name, part in model.model.named_modules() if part is block)
    own = vars(block)["forward"] = block.forward
    with replaced_outputs(model, Given({name: torch.zeros(1)}, ())):
        assert torch.equal(block(torch.ones(1)), torch.zeros(1))
    assert vars(block)["forward"] is own


@pytest.mark.parametrize("family", one_of_each(ALL_FAMILIES, "vit", "resnet", mark="faults"))
@pytest.mark.parametrize(
    "is_bias_only",
    [False, pytest.param(True, marks=pytest.mark.faults)],
    ids=["least squares", "bias"],
)
def test_fit_from_waypoints_equals_fit_of_whole_passes(
    family: str, is_bias_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_base(family, tmp_path).eval()
    pruned, masks = halved(dense)
    batches, fitted, calls = batches_of(dense, [3, 1, 2]), [], []
    count = lambda module, args, output: calls.append(1)  # noqa: E731
    for size in (NEVER, EVERYWHERE):
        monkeypatch.setattr(fitting.Storage, "of_ranks", lambda *_, size=size: Room(size))
        network = copy.deepcopy(pruned)
        handles = [part.register_forward_hook(count) for part in network.model.modules() if not [*part.children()]]
        fitting.fit_layers(dense, network, masks, Calibration(batches), is_bias_only=is_bias_only)
        for handle in handles:
            handle.remove()
        fitted.append((network.state_dict(), len(calls)))
        assert not any("forward" in vars(part) for part in network.modules())
        calls.clear()
    (whole, slow), (late, fast) = fitted
    assert whole.keys() == late.keys()
    assert all(torch.equal(value, late[name]) for name, value in whole.items())
    assert not all(torch.equal(value, pruned.state_dict()[name]) for name, value in whole.items())
    assert fast < slow


def test_each_layer_of_a_vit_has_a_waypoint(tmp_path: Path) -> None:
    assert waypoints_of(make_base("vit", tmp_path)) == {
        "patch_embed": (),  # before the first qkv
        "blocks.0.attn.norm": ("norm_pre",),  # before the projection of the heads
        "blocks.0.drop_path1": ("norm_pre",),  # before fc1: the sum of both is no output of a module
        "blocks.0.mlp.norm": ("norm_pre", "blocks.0.drop_path1"),  # before fc2
        "blocks.0": (),
        "blocks.1.attn.norm": ("blocks.0",),
        "blocks.1.drop_path1": ("blocks.0",),
        "blocks.1.mlp.norm": ("blocks.0", "blocks.1.drop_path1"),
        "head_drop": (),
    }


class Reader(nn.Module):
    """A network of three stages of two layers each, whose last stage may read the output of the first."""

    def __init__(self, reads: str):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.first, self.second, self.third = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(4, 7)
        self.reads = reads

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixel_values)
        first = self.first(x)
        second = self.second(first)
        if self.reads == "first":
            second = second + first
        elif self.reads == "image":
            second = second + pixel_values[:, :1]
        elif self.reads == "stem":
            second = second + x
        elif self.reads == "hidden":  # NaN is hidden, and zeros of the image are not
            second = second + x.nan_to_num(0.5)
        return self.head(self.third(second).mean((2, 3)))


def reader(reads: str, folder: Path) -> Model:
    torch.manual_seed(0)
    model = make_base("vit", folder)
    model.model, model.config.image_size = Reader(reads), [3, 8, 8]
    return model.eval()


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ("nothing", {"stem": (), "first": (), "second": (), "third": ()}),
        ("first", {"stem": (), "first": (), "second": ("first",), "third": ()}),
        ("stem", {"stem": (), "first": ("stem",), "second": ("stem",), "third": ()}),
        ("image", {"third": ()}),
        ("hidden", {"stem": (), "first": ("stem",), "second": ("stem",), "third": ()}),
    ],
)
def test_waypoint_needs_all_that_is_read_later(
    reads: str, expected: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    assert waypoints_of(reader(reads, tmp_path)) == expected


class Cell(nn.Module):
    """A cell that reads the two cells before it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, before: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return self.left(before).relu() + self.right(last)


class Cells(nn.Module):
    """A network of cells that each read the two cells before them, as those of architecture searches do."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1))
        self.cells = nn.ModuleList(Cell() for _ in range(depth))
        self.head = nn.Linear(4, 7)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        before = last = self.stem(pixel_values)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last.mean((2, 3)))


def cells(depth: int, folder: Path) -> Model:
    torch.manual_seed(0)
    model = make_base("vit", folder)
    model.model, model.config.image_size = Cells(depth), [3, 8, 8]
    return model.eval()


def test_cells_that_read_two_cells_are_waypoints(tmp_path: Path) -> None:
    assert waypoints_of(cells(3, tmp_path)) == {
        "stem": (),
        "cells.0.left": ("stem",),
        "cells.0": ("stem",),
        "cells.1.left": ("cells.0",),
        "cells.1": ("cells.0",),
        "cells.2.left": ("cells.1",),
        "cells.2": (),
    }


def test_fit_of_cells_is_linear_in_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, states, convolve = [], [], nn.Conv2d.forward
    for depth, size in ((3, EVERYWHERE), (6, EVERYWHERE), (12, EVERYWHERE), (12, NEVER)):
        dense = cells(depth, tmp_path)
        fitted = copy.deepcopy(dense)
        with torch.no_grad():
            for cell in fitted.model.cells:
                cell.left.weight.mul_(0.9)
        calls: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(1) or convolve(self, x))  # noqa: B023
            patch.setattr(fitting.Storage, "of_ranks", lambda *_, size=size: Room(size))
            fitting.fit_layers(dense, fitted, {}, Calibration(batches_of(dense, [4])))
        counts.append(len(calls))
        states.append(fitted.state_dict())
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
    assert counts[2] < counts[3]
    assert all(torch.equal(value, states[2][name]) for name, value in states[3].items())


def stages_of(model: Model, batches: list, room: int = EVERYWHERE) -> Passes:
    """Return passes over a `Reader`, with a waypoint before each layer."""
    layers = ["stem", "first.0", "second.0", "third.0", "head"]
    find = functools.cache(functools.partial(find_waypoints, model, layers))
    return Passes(model, Images([images for images, _ in batches]), find, Room(room))


def test_passes_start_at_the_last_waypoint_before_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reader("nothing", tmp_path)
    batches = batches_of(model, [2, 3])
    passes, ran = stages_of(model, batches), []
    names, convolve = {module: name for name, module in model.model.named_modules()}, nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: ran.append(names.get(self)) or convolve(self, x))
    stages = ["stem", "first.0", "second.0", "third.0"]
    for layer, expected in (
        ("stem", stages),
        ("second.0", stages[2:]),
        ("third.0", stages[3:]),
        ("first.0", stages[3:]),
    ):
        with torch.no_grad():
            passes.reach(layer)
            for (images, _), (begun, begin) in zip(batches, passes, strict=True):
                assert begun.shape == images.shape
                wanted = model(pixel_values=images).logits
                ran.clear()
                with begin():
                    assert torch.equal(model(pixel_values=begun).logits, wanted)
                assert ran == expected


def test_passes_through_a_layer_also_reach_it(tmp_path: Path) -> None:
    model = reader("stem", tmp_path)
    batches = batches_of(model, [2, 3])
    reaching, through, ended = (stages_of(model, batches) for _ in range(3))
    with torch.no_grad():
        wanted = [model(pixel_values=images).logits for images, _ in batches]
        for layer in ("first.0", "third.0"):
            reaching.reach(layer)
            for (images, begin), logits in zip(through.through(layer), wanted, strict=True):
                with begin():
                    assert torch.equal(model(pixel_values=images).logits, logits)
            assert through._current == reaching._current
            for (_, one), (_, other) in zip(through.batches(), reaching.batches(), strict=True):
                assert one.outputs.keys() == other.outputs.keys()
                kept = [name for name, output in one.outputs.items() if not output.is_meta]
                assert kept and all(torch.equal(one.outputs[name], other.outputs[name]) for name in kept)
        _, begin = next(ended.through("third.0"))
        with begin():
            model(pixel_values=batches[0][0])
    assert ended._current is None


def test_outputs_above_the_byte_limit_are_not_stored(tmp_path: Path) -> None:
    model = reader("nothing", tmp_path)
    batches = batches_of(model, [2, 3])
    size = 5 * 4 * 8 * 8 * 4  # outputs of a stage: 4 channels of 8 x 8 in float32
    for allowed, starts in ((size, "first"), (size - 1, None)):
        passes = stages_of(model, batches, allowed)
        with torch.no_grad():
            passes.reach("second.0")
        assert (passes._current and passes._current.name) == starts


def test_output_that_is_still_needed_is_stored_once(tmp_path: Path) -> None:
    model = reader("stem", tmp_path)
    passes = stages_of(model, batches_of(model, [2]))
    with torch.no_grad():
        passes.reach("first.0")
        stem = passes._held[0][1].outputs["stem"]
        passes.reach("second.0")
    assert passes._held[0][1].outputs["stem"] is stem


class UnreadTokens(nn.Module):
    """The last layer reads all tokens, and the head only the first one, which no earlier module has written."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem, self.early = nn.Linear(32, 8), nn.Sequential(nn.Linear(8, 8))
        self.token, self.block = nn.Parameter(torch.randn(1, 1, 8)), nn.Sequential(nn.Linear(8, 8))
        self.last, self.head = nn.Linear(8, 8), nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.early(self.stem(images.mean(1)))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y = self.block(x[:, :1].detach() * 0 + 1)
        return self.head((self.last(x)[:, :1] + y).mean(1))


@timm.models.register_model
def tiny_unread_tokens(num_classes: int = 5, **_: object) -> nn.Module:
    net = UnreadTokens(num_classes)
    net.pretrained_cfg = {"input_size": (3, 32, 32), "num_classes": num_classes}
    return net


def test_tokens_that_only_a_layer_reads_are_needed() -> None:
    model = make_timm("tiny_unread_tokens", 32).eval()
    assert waypoints_of(model) == {"stem": (), "early": (), "block": ("early",), "last": ("block",)}


def test_search_for_waypoints_is_linear_in_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for depth in (8, 16, 32):
        model = make_timm(
            "vit_tiny_patch16_224", 16, img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2
        )
        calls: list[int] = []
        linear = nn.Linear.forward
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", lambda self, x: calls.append(1) or linear(self, x))  # noqa: B023
            assert [*waypoints_of(model.eval())][-2:] == [f"blocks.{depth - 1}.mlp.norm", "head_drop"]
        counts.append(len(calls))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
