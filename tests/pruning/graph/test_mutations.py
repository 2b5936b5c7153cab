"""Mutation tests of the oracles: each of thirteen faults in a rule must be detected on a small network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
from helpers.oracles import axis_counts, make_images, mask_error, permutation_error, randomize
from torch import Tensor, nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.errors import IsoPruneError
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph import tracer
from isoprune_hf.pruning.graph.axis import Axis, mark_batch, product
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.rules import convolution, pointwise, products, views
from isoprune_hf.pruning.graph.trace import ONE
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe

WIDTH = 8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.down(self.up(self.norm(tokens)).relu())


class Norm(nn.Module):
    """A norm whose weights are the only tie of its channels to the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(tokens))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.half = WIDTH // 2
        self.left, self.right = nn.Linear(self.half, 5), nn.Linear(self.half, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        left, right = self.left(tokens[..., : self.half]), self.right(tokens[..., self.half :])
        return torch.cat([right.relu(), left], dim=-1)


class Kinds(nn.Module):
    """A weight and a gate per token, computed by the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.scale = nn.Linear(WIDTH, 2), nn.Parameter(torch.ones(2))

    def forward(self, tokens: Tensor) -> Tensor:
        weights, gates = (self.both(tokens) * self.scale).unbind(-1)
        return tokens * (weights * gates.sigmoid())[..., None]


class Order(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(WIDTH).roll(3))
        self.mix = nn.Linear(WIDTH, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(tokens[:, :, self.order] * tokens)


class Pixels(nn.Module):
    """A layer on an image, between layers on tokens."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.out = layer, nn.Linear(WIDTH, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        pixels = tokens.transpose(1, 2).unflatten(2, (int(count**0.5), -1))
        return self.out(self.layer(pixels).relu().flatten(2).transpose(1, 2))


# Network -> its body, and the channels of its groups if nothing is tied without need.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "residual": (Residual, [8, 12]),
    "norm": (Norm, [6, 8]),
    "attention": (Attention, [8, 8, 8]),
    "slices": (Slices, [4, 4, 5, 7]),
    "depthwise": (lambda: Pixels(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)), [6, 8]),
    "grouped": (lambda: Pixels(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2)), [4, 4, 6]),
    "group norm": (lambda: Pixels(nn.GroupNorm(2, WIDTH)), [4, 6]),
    "kinds": (Kinds, [8]),
    "order": (Order, [6]),
}


class Net(nn.Module):
    def __init__(self, body: str, num_classes: int):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, WIDTH, 4, 4), NETWORKS[body][0]()
        width = self.body(torch.zeros(1, 4, WIDTH)).shape[-1]
        self.head = nn.Linear(width, num_classes)
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


@timm.models.register_model
def isoprune_test_faults(num_classes: int = 1000, body: str = "residual", **_: object) -> nn.Module:
    return Net(body, num_classes)


def open_network(body: str) -> IsoPruneForImageClassification:
    base = {"library": "timm", "architecture": "isoprune_test_faults", "args": {"body": body}}
    model = IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=5, image_size=[3, 8, 8])).eval()
    randomize(model)
    return model


def judge(body: str) -> Iterator[str]:
    """Yield the oracles that detect a fault: counts, permutation, cut."""
    model = open_network(body)
    groups, images = trace_groups(model), make_images(model)
    if sorted(count for counts in axis_counts(groups).values() for count in counts) != NETWORKS[body][1]:
        yield "counts"
    if permutation_error(model, groups, images) > 1e-9:
        yield "permutation"
    recipe = PruneRecipe(criterion="l1", ratio=0.5, head_ratio=0, head_dim_ratio=0.5, round_to=1)
    try:
        plan = make_plan(groups, score_groups(model, groups, criterion="l1"), recipe)
        if mask_error(model, apply_plan(model, plan, groups), groups, plan, images) > 1e-9:
            yield "cut"
    except IsoPruneError:
        yield "cut"


@pytest.mark.parametrize("body", NETWORKS)
def test_oracles_accept_correct_rules(body: str) -> None:
    assert list(judge(body)) == []


@dataclass(frozen=True)
class Fault:
    """A fault, a network that it affects, and the oracle that must detect it."""

    put: Callable[[pytest.MonkeyPatch], None]
    body: str
    seen_by: str


def replace_rule(*names: str) -> Callable[[Callable[..., Any]], Callable[[pytest.MonkeyPatch], None]]:
    """Return a function that replaces the rules of operations by one that takes the right rule first."""

    def make(wrong: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
        def put(patch: pytest.MonkeyPatch) -> None:
            rules = {name: partial(wrong, tracer.AXIS_RULES[name]) for name in names}
            patch.setattr(tracer, "AXIS_RULES", {**tracer.AXIS_RULES, **rules})

        return put

    return make


def no_broadcast_tie(patch: pytest.MonkeyPatch) -> None:
    def wrong(trace: Any, tensors: Any, shape: Any) -> tuple[Axis, ...]:
        rows = [trace.axes(tensor)[::-1] for tensor in tensors]
        at = [
            [row[dim] for row in rows if dim < len(row) and row[dim].size == size]
            for dim, size in enumerate(shape[::-1])
        ]
        return tuple(met[0] if met else ONE for met in at)[::-1]

    patch.setattr(pointwise, "broadcast", wrong)


def no_contraction_tie(patch: pytest.MonkeyPatch) -> None:
    def wrong(trace: Any, out: Tensor, left: Tensor, right: Tensor) -> tuple[Axis, ...]:
        return (*trace.axes(left)[:-1], trace.axes(right)[-1])

    patch.setattr(products, "_matmul", wrong)  # called by the rule of addmm
    patch.setattr(tracer, "AXIS_RULES", {**tracer.AXIS_RULES, "mm": wrong, "bmm": wrong})


def swapped_view(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(views, "product", lambda parts: product(parts[::-1]))


@replace_rule("native_layer_norm")
def untied_norm(right: Any, trace: Any, out: Any, x: Tensor, *args: Any) -> Any:
    return right(trace, out, x, args[0], None, None)


@replace_rule("bmm")
def no_batch_tie(right: Any, trace: Any, out: Tensor, one: Tensor, other: Tensor) -> tuple[Axis, ...]:
    (batch, rows, inner), (_, inner_too, columns) = trace.axes(one), trace.axes(other)
    trace.tie((inner, inner_too))
    mark_batch(batch)
    return batch, rows, columns


@replace_rule("slice")
def shifted_slice(
    right: Any, trace: Any, out: Tensor, x: Tensor, dim: int = 0, start: int = 0, end: int = 0, step: int = 1
) -> tuple[Axis, ...]:
    return right(trace, out, x, dim, 0, out.shape[dim])


@replace_rule("cat")
def reversed_cat(right: Any, trace: Any, out: Tensor, tensors: Any, dim: int = 0) -> tuple[Axis, ...]:
    return right(trace, out, tensors[::-1], dim)


def untied_groups(*, is_depthwise: bool) -> Callable[[pytest.MonkeyPatch], None]:
    right = convolution._convolve_groups

    def wrong(trace: Any, channels: Axis, weight: Any, groups: int, *, transposed: bool) -> Axis:
        if (channels.size == groups) is is_depthwise:
            return weight[0]
        return right(trace, channels, weight, groups, transposed=transposed)

    return lambda patch: patch.setattr(convolution, "_convolve_groups", wrong)


@replace_rule("native_group_norm")
def free_groups(right: Any, trace: Any, out: Any, x: Tensor, *args: Any) -> Any:
    return right(trace, out, x, *args[:-2], 1, args[-1])


@replace_rule("unbind")
def free_unbind(right: Any, trace: Any, out: Any, x: Tensor, dim: int = 0) -> Any:
    axes = list(trace.axes(x))
    del axes[dim]
    return [tuple(axes)] * len(out)


@replace_rule("index")
def free_index(right: Any, trace: Any, out: Tensor, x: Tensor, indices: Any) -> Any:
    return trace.axes(x)


@replace_rule("addmm")
def surplus_tie(right: Any, trace: Any, out: Tensor, bias: Tensor, one: Tensor, other: Tensor, **_: Any) -> Any:
    axes = right(trace, out, bias, one, other)
    if trace.axes(other)[0].size == axes[-1].size:
        trace.tie((trace.axes(other)[0], axes[-1]))
    return axes


FAULTS = {
    "no-broadcast-tie": Fault(no_broadcast_tie, "residual", "permutation"),
    "no-contraction-tie": Fault(no_contraction_tie, "residual", "permutation"),
    "view-order-swapped": Fault(swapped_view, "attention", "permutation"),
    "norm-affine-untied": Fault(untied_norm, "norm", "permutation"),
    "no-batch-tie": Fault(no_batch_tie, "attention", "counts"),
    "slice-offset": Fault(shifted_slice, "slices", "permutation"),
    "cat-order": Fault(reversed_cat, "slices", "permutation"),
    "depthwise-untied": Fault(untied_groups(is_depthwise=True), "depthwise", "permutation"),
    "conv-groups-untied": Fault(untied_groups(is_depthwise=False), "grouped", "permutation"),
    "groupnorm-groups-free": Fault(free_groups, "group norm", "permutation"),
    "unbind-not-frozen": Fault(free_unbind, "kinds", "permutation"),
    "index-not-frozen": Fault(free_index, "order", "permutation"),
    "over-tying": Fault(surplus_tie, "attention", "counts"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_rule_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    fault.put(monkeypatch)
    assert any(seen == fault.seen_by for seen in judge(fault.body))
