from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.engine_reference import plain_groups, reference_groups
from helpers.marks import one_of_each
from helpers.odd_networks import open_odd
from helpers.tiny_models import ALL_FAMILIES, FAMILIES, make_base, make_images
from helpers.traced_models import make_timm, shuffle
from torch import nn
from torch_pruning import _helpers
from torch_pruning.dependency import index_mapping

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models import load_base
from isoprune_hf.models.feature_loss import FEATURES
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.graph.torch_pruning.index_maps import Positions, apply_mapping
from isoprune_hf.pruning.groups import CoupledGroup


@timm.models.register_model
def joints_net(num_classes: int = 1000, **_: object) -> nn.Module:
    """Channels that are split, concatenated in another order, and flattened."""

    class Joints(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.middle = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 6, 3, padding=1)
            self.last, self.fc = nn.Conv2d(14, 4, 3), nn.Linear(16, num_classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            stem = self.stem(images).relu()
            first, second = (part.neg() for part in stem.split([3, 5], dim=1))
            middle = self.middle(torch.cat([second, first], 1))
            return self.fc(self.last(torch.cat([middle, stem], 1)).flatten(1))

    return Joints()


@timm.models.register_model
def repeats_net(num_classes: int = 1000, **_: object) -> nn.Module:
    """Channels that an expand repeats, which torch-pruning supports for language models only."""

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.keys, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(24, num_classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            keys = self.keys(self.stem(images).flatten(2).transpose(1, 2))
            keys = keys.view(1, -1, 2, 4).transpose(1, 2)[:, :, None].expand(-1, -1, 3, -1, -1)
            return self.fc(keys.reshape(1, 6, -1, 4).transpose(1, 2).reshape(1, -1, 24)).mean(1)

    return Repeats()


@timm.models.register_model
def wirings_net(num_classes: int = 1000, **_: object) -> nn.Module:
    """Two groups of a convolution, two norms and a convolution: the norms in sequence, and in parallel."""

    class Wirings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm1, self.norm2 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.second, self.norm3, self.norm4 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.third, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, num_classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = self.second(self.norm2(self.norm1(self.first(images)).relu()))
            hidden = self.third(self.norm3(hidden) + self.norm4(hidden.tanh()))
            return self.fc(hidden.mean((2, 3)))

    return Wirings()


@pytest.mark.parametrize(
    "family", one_of_each([*ALL_FAMILIES, "densenet", "joints"], "vit", "swin", "resnet", "joints")
)
def test_groups_equal_those_of_torch_pruning(family: str, tmp_path: Path) -> None:
    if family == "densenet":
        model = make_timm("densenet121", block_config=(3, 2), growth_rate=8)
    else:
        model = make_timm("joints_net", 16) if family == "joints" else make_base(family, tmp_path)
    assert plain_groups(trace_groups(model, engine="torch-pruning")) == reference_groups(model)


def elements(groups: Iterable[CoupledGroup]) -> dict[frozenset[tuple[str, int, int, int]], tuple[str, int, int]]:
    """Return the elements of all channels and heads of each group, without order -> name, channels, heads."""
    return {
        frozenset(
            (member.parameter, member.dim, unit, int(position))
            for member in (*group.members, *group.head_members)
            for unit, row in enumerate(member.index)
            for position in row
        ): (group.name, group.channels, group.num_heads)
        for group in groups
    }


@pytest.mark.parametrize("family", [*FAMILIES, "densenet"])
def test_both_engines_find_the_same_groups(family: str, tmp_path: Path) -> None:
    if family == "densenet":
        model = make_timm("densenet121", block_config=(3, 2), growth_rate=8)
    else:
        model = make_timm("resnext50_32x4d") if family == "resnext" else make_base(family, tmp_path)
    assert elements(trace_groups(model)) == elements(trace_groups(model, engine="torch-pruning"))


def test_channels_split_by_literals_are_frozen() -> None:
    groups = {group.name for group in trace_groups(make_timm("joints_net", 16))}
    assert groups == {"middle", "last"}


def test_split_concatenated_and_flattened_channels_keep_positions() -> None:
    model = make_timm("joints_net", 16)
    groups = {group.name: group for group in trace_groups(model, engine="torch-pruning")}
    stem = {(member.parameter, member.dim): member.index.ravel().tolist() for member in groups["stem"].members}
    assert stem["middle.weight", 1] == [5, 6, 7, 0, 1, 2, 3, 4]
    assert stem["last.weight", 1] == [6, 7, 8, 9, 10, 11, 12, 13]
    last = {(member.parameter, member.dim): member.index for member in groups["last"].members}
    assert last["fc.weight", 1].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda reverse: index_mapping._ConcatIndexMapping([3, 9], reverse),
        lambda reverse: index_mapping._SplitIndexMapping([3, 9], reverse),
        lambda reverse: index_mapping._SliceIndexMapping(1, 2, 3, 11, reverse),
        lambda reverse: index_mapping._FlattenIndexMapping(4, reverse),
    ],
)
@pytest.mark.parametrize("count", [4, 40])
def test_index_maps_agree_with_torch_pruning(build, reverse: bool, count: int) -> None:
    mapping, generator = build(reverse), np.random.default_rng(count)
    for _ in range(20):
        idx, root = generator.permutation(count), generator.integers(0, 9, count)
        pairs = [_helpers._HybridIndex(*pair) for pair in zip(idx.tolist(), root.tolist(), strict=True)]
        expected = [(pair.idx, pair.root_idx) for pair in mapping(pairs)]
        found = apply_mapping(mapping, Positions.of(idx, root))
        pairs = list(zip(found.idx.tolist(), found.root.tolist(), strict=True))
        if reverse and type(mapping) is index_mapping._FlattenIndexMapping:
            expected.sort()  # torch-pruning gives them as a set
        assert pairs == expected
        assert not expected or (found.low, found.high - 1) == (found.idx.min(), found.idx.max())


def test_unknown_index_map_is_rejected_by_name() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="GQAIndexMapping"):
        trace_groups(make_timm("repeats_net"), engine="torch-pruning")


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffling_channels_of_groups_keeps_the_output(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path).double()
    images = make_images(model).double()
    shuffled = shuffle(model)
    with torch.no_grad():
        expected, found = model(images).logits, shuffled(images).logits
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    pairs = list(zip(shuffled.parameters(), model.parameters(), strict=True))
    assert sum(torch.equal(new, old) for new, old in pairs) < len(pairs) / 2


def test_vit_has_one_stream_and_groups_per_block(tmp_path: Path) -> None:
    groups = trace_groups(make_base("vit", tmp_path))
    found = [(group.name, group.channels, group.num_heads) for group in groups]
    assert found == [
        ("patch_embed.proj", 32, 0),
        ("blocks.0.attn", 32, 4),
        ("blocks.0.mlp.fc1", 128, 0),
        ("blocks.1.attn", 32, 4),
        ("blocks.1.mlp.fc1", 128, 0),
    ]
    assert len({group.signature for group in groups}) == 3


def test_distilled_deit_stream_has_tokens_and_both_heads(tmp_path: Path) -> None:
    stream = next(group for group in trace_groups(make_base("deit", tmp_path)) if group.name == "patch_embed.proj")
    members = {(member.parameter, member.dim) for member in stream.members}
    expected = {("cls_token", 2), ("dist_token", 2), ("pos_embed", 2), ("patch_embed.proj.weight", 0)}
    expected |= {("head.weight", 1), ("head_dist.weight", 1), ("blocks.1.attn.qkv.weight", 1), ("norm.bias", 0)}
    assert expected <= members
    assert ("head.weight", 0) not in members and ("head_dist.bias", 0) not in members


def test_fused_queries_keys_values_are_stacked(tmp_path: Path) -> None:
    groups = {group.name: group for group in trace_groups(make_base("vit", tmp_path))}
    members = {member.parameter: member for member in groups["blocks.1.attn"].members}
    assert members["blocks.1.attn.qkv.weight"].index[5].tolist() == [5, 37, 69]
    assert members["blocks.1.attn.qkv.bias"].index[31].tolist() == [31, 63, 95]
    assert members["blocks.1.attn.proj.weight"].dim == 1
    assert members["blocks.1.attn.proj.weight"].index[5].tolist() == [5]


def test_swin_ties_patch_merging_and_bias_tables(tmp_path: Path) -> None:
    groups = {group.name: group for group in trace_groups(make_base("swin", tmp_path))}
    merging = {member.parameter: member for member in groups["patch_embed.proj"].members}
    assert merging["layers.1.downsample.norm.weight"].index[3].tolist() == [3, 27, 51, 75]
    assert merging["layers.1.downsample.reduction.weight"].dim == 1
    assert groups["layers.1.downsample.reduction"].channels == 48
    tables = groups["layers.1.blocks.0.attn"].head_members
    assert [(table.parameter, table.dim, table.index.tolist()) for table in tables] == [
        ("layers.1.blocks.0.attn.relative_position_bias_table", 1, [[0], [1], [2], [3]])
    ]


def test_grouped_convolution_unit_has_channel_per_group(tmp_path: Path) -> None:
    model = make_base("resnext", tmp_path)
    groups = {group.name: group for group in trace_groups(model)}
    conv = model.model.layer1[0].conv2
    assert conv.groups == 4 and conv.weight.shape[1] == conv.in_channels // 4
    inner = groups["layer1.0.conv1"]
    assert inner.channels == conv.in_channels // 4
    members = {(member.parameter, member.dim): member.index for member in inner.members}
    step = conv.in_channels // 4
    assert members["layer1.0.conv1.weight", 0][1].tolist() == [1, 1 + step, 1 + 2 * step, 1 + 3 * step]
    assert members["layer1.0.conv2.weight", 1][1].tolist() == [1]


def test_mobilenet_hidden_layers_form_one_class() -> None:
    base = {"library": "torchvision", "architecture": "mobilenet_v2", "args": {}}
    with torch.device("meta"):
        model = IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=1000, image_size=[3, 224, 224]))
    groups = trace_groups(model)
    classes: dict[str, int] = {}
    for group in groups:
        classes[group.signature] = classes.get(group.signature, 0) + 1
    assert classes["Conv2d.out|BatchNorm2d.out|Conv2d.depthwise|BatchNorm2d.out|Conv2d.in"] == 17


def test_only_strict_signatures_distinguish_kernels(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    inside = [f"layer{stage}.0.conv{number}" for stage in (1, 2, 3, 4) for number in (1, 2)]
    paper = {group.name: group.signature for group in trace_groups(model)}
    assert {paper[name] for name in inside} == {"Conv2d.out|BatchNorm2d.out|Conv2d.in"}
    strict = {group.name: group.signature for group in trace_groups(model, "strict")}
    one, three, two = (
        f"(kernel {kernel}, stride {stride}, groups 1)"
        for kernel, stride in (("1x1", "1x1"), ("3x3", "1x1"), ("3x3", "2x2"))
    )
    expected = {f"layer{stage}.0.conv1": (one, three if stage == 1 else two) for stage in (1, 2, 3, 4)}
    expected |= {f"layer{stage}.0.conv2": (three if stage == 1 else two, one) for stage in (1, 2, 3, 4)}
    for name, (written, read) in expected.items():
        assert strict[name] == f"Conv2d.out{written}|BatchNorm2d.out|Conv2d.in{read}#0>1,1>2", name


def test_only_strict_signatures_distinguish_connections() -> None:
    model = make_timm("wirings_net")
    paper = {group.name: group.signature for group in trace_groups(model)}
    assert paper["first"] == paper["second"] == "Conv2d.out|BatchNorm2d.out|BatchNorm2d.out|Conv2d.in"
    strict = {group.name: group.signature.partition("#") for group in trace_groups(model, "strict")}
    assert strict["first"][0] == strict["second"][0]
    assert strict["first"][2] == "0>1,1>2,2>3"
    assert strict["second"][2] == "0>1,0>2,1>3,2>3"


@pytest.mark.parametrize("signature", ["paper", "strict"])
@pytest.mark.parametrize(("family", "hidden"), [("vit", "mlp.fc1"), ("hf-vit", "mlp.fc1"), ("swin", "mlp.fc1")])
def test_transformer_hidden_layers_form_one_class(signature: str, family: str, hidden: str, tmp_path: Path) -> None:
    groups = trace_groups(make_base(family, tmp_path), signature)
    classes = [group.signature for group in groups if group.name.endswith(hidden)]
    assert len(classes) == {"vit": 2, "hf-vit": 2, "swin": 4}[family] and len(set(classes)) == 1
    assert len({group.signature for group in groups if group.num_heads}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_strict_classes_refine_paper_classes(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    paper, strict = trace_groups(model), trace_groups(model, "strict")
    assert [(g[0], *g[2:]) for g in plain_groups(paper)] == [(g[0], *g[2:]) for g in plain_groups(strict)]
    pairs = {(fine.signature, coarse.signature) for fine, coarse in zip(strict, paper, strict=True)}
    assert len(pairs) == len({fine for fine, _ in pairs})


@pytest.mark.parametrize("family", FAMILIES)
def test_classifier_outputs_are_in_no_group(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path, labels=7)
    for group in trace_groups(model):
        for member in group.members:
            size = model.model.state_dict()[member.parameter].shape[0]
            assert not (member.dim == 0 and size == 7), member.parameter


class Maps(nn.Module):
    """Returns the last map by a name, and an earlier one within a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = (nn.Conv2d(*widths, 3, padding=1) for widths in ((3, 4), (4, 5), (5, 6)))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        stem = self.stem(images)
        return {"last_hidden_state": self.last(self.middle(stem.relu())), "maps": (stem,)}


def test_outputs_within_named_tuples_are_in_no_group() -> None:
    model = HeldModel(IsoPruneConfig(image_size=[3, 8, 8]), Maps(), FEATURES)
    assert [group.name for group in trace_groups(model)] == ["middle"]


def test_tracing_leaves_model_unchanged(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path).train()
    model.model.fc.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    trace_groups(model)
    assert model.training and all(module.training for module in model.modules())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tracing_works_without_gradients(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path)
    expected = plain_groups(trace_groups(model))
    with torch.no_grad():
        assert plain_groups(trace_groups(model)) == expected
        assert not torch.is_grad_enabled()


def test_attention_with_norms_is_rejected(tmp_path: Path) -> None:
    model = load_base(
        "timm/vit_tiny_patch16_224", False, model_args={"img_size": 32, "qk_norm": True, "depth": 1}
    ).model
    with pytest.raises(UnsupportedArchitectureError, match=r"blocks\.0\.attn \(Attention\)"):
        trace_groups(model, engine="torch-pruning")


def test_common_frequencies_leave_heads_to_each_attention() -> None:
    """Both attentions rotate their eight dims by the same four frequencies: these stay, and the heads go."""
    model = open_odd("rotary_frequencies").model
    groups = {group.name.removeprefix("model."): group for group in trace_groups(model)}
    for path in ("first", "second"):
        group = groups[f"{path}.query"]
        places = {(member.parameter.removeprefix("model."), member.dim): member.index for member in group.members}
        rows = [(f"{path}.{layer}.{leaf}", 0) for layer in ("query", "key", "value") for leaf in ("weight", "bias")]
        assert places.keys() == {*rows, (f"{path}.project.weight", 1)}
        assert all(index.tolist() == np.arange(32).reshape(4, 8).tolist() for index in places.values())


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 28}),
        ("vit_base_patch16_rope_reg1_gap_256", {"img_size": 32, "depth": 1}),
        ("naflexvit_base_patch16_gap", {"qk_norm": True}),
    ],
)
def test_attention_with_rotary_positions_is_rejected(architecture: str, args: dict[str, object]) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"prune\.engine: axes"):
        trace_groups(make_timm(architecture, args.get("img_size", 32), **args), engine="torch-pruning")


def test_model_unsupported_by_torch_pruning_is_rejected() -> None:
    config = IsoPruneConfig(
        base={"library": "timm", "architecture": "coat_tiny", "args": {}}, num_labels=10, image_size=[3, 224, 224]
    )
    with torch.device("meta"):
        model = IsoPruneForImageClassification(config)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        trace_groups(model, engine="torch-pruning")
    assert "\n" not in str(caught.value)
