import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, make_base, make_images

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.graph import trace_groups


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffling_the_channels_of_a_group_in_all_members_leaves_the_output_alone(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path).double()
    images = make_images(model).double()
    with torch.no_grad():
        expected = model(images).logits
    generator = np.random.default_rng(0)
    shuffled = copy.deepcopy(model)
    tensors = dict(shuffled.model.state_dict())
    for group in trace_groups(model):
        heads, dims = max(group.num_heads, 1), group.head_dim or group.channels
        order_of_heads = generator.permutation(heads)
        # Within each head another order of dims; queries, keys and values of a head move together.
        channels = np.concatenate([head * dims + generator.permutation(dims) for head in order_of_heads])
        for member, order in [
            *((m, channels) for m in group.members),
            *((m, order_of_heads) for m in group.head_members),
        ]:
            tensor = tensors[member.parameter]
            positions = torch.arange(tensor.shape[member.dim])
            positions[torch.from_numpy(member.index)] = torch.from_numpy(member.index[order])
            tensor.copy_(tensor.clone().index_select(member.dim, positions))
    with torch.no_grad():
        found = shuffled(images).logits
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    pairs = list(zip(shuffled.parameters(), model.parameters(), strict=True))
    assert sum(torch.equal(new, old) for new, old in pairs) < len(pairs) / 2


def test_a_vit_has_one_stream_and_one_mlp_and_one_attention_for_each_block(tmp_path: Path) -> None:
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


def test_the_stream_of_a_distilled_deit_holds_tokens_positions_and_both_heads(tmp_path: Path) -> None:
    stream = next(group for group in trace_groups(make_base("deit", tmp_path)) if group.name == "patch_embed.proj")
    members = {(member.parameter, member.dim) for member in stream.members}
    expected = {("cls_token", 2), ("dist_token", 2), ("pos_embed", 2), ("patch_embed.proj.weight", 0)}
    expected |= {("head.weight", 1), ("head_dist.weight", 1), ("blocks.1.attn.qkv.weight", 1), ("norm.bias", 0)}
    assert expected <= members
    assert ("head.weight", 0) not in members and ("head_dist.bias", 0) not in members


def test_fused_queries_keys_and_values_lie_one_behind_the_other(tmp_path: Path) -> None:
    groups = {group.name: group for group in trace_groups(make_base("vit", tmp_path))}
    members = {member.parameter: member for member in groups["blocks.1.attn"].members}
    assert members["blocks.1.attn.qkv.weight"].index[5].tolist() == [5, 37, 69]
    assert members["blocks.1.attn.qkv.bias"].index[31].tolist() == [31, 63, 95]
    assert members["blocks.1.attn.proj.weight"].dim == 1
    assert members["blocks.1.attn.proj.weight"].index[5].tolist() == [5]


def test_a_swin_ties_four_copies_in_patch_merging_and_tables_to_heads(tmp_path: Path) -> None:
    groups = {group.name: group for group in trace_groups(make_base("swin", tmp_path))}
    merging = {member.parameter: member for member in groups["patch_embed.proj"].members}
    assert merging["layers.1.downsample.norm.weight"].index[3].tolist() == [3, 27, 51, 75]
    assert merging["layers.1.downsample.reduction.weight"].dim == 1
    assert groups["layers.1.downsample.reduction"].channels == 48
    tables = groups["layers.1.blocks.0.attn"].head_members
    assert [(table.parameter, table.dim, table.index.tolist()) for table in tables] == [
        ("layers.1.blocks.0.attn.relative_position_bias_table", 1, [[0], [1], [2], [3]])
    ]


def test_a_channel_of_a_grouped_convolution_stands_for_one_channel_of_each_group(tmp_path: Path) -> None:
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


def test_the_hidden_layers_of_all_blocks_of_a_mobilenet_are_one_isomorphic_class() -> None:
    base = {"library": "torchvision", "architecture": "mobilenet_v2", "args": {}}
    with torch.device("meta"):
        model = IsoPruneForImageClassification(IsoPruneConfig(base=base, num_labels=1000, image_size=[3, 224, 224]))
    groups = trace_groups(model)
    classes: dict[str, int] = {}
    for group in groups:
        classes[group.signature] = classes.get(group.signature, 0) + 1
    assert classes["Conv2d.out|BatchNorm2d.out|Conv2d.depthwise|BatchNorm2d.out|Conv2d.in"] == 17


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_of_the_classifier_are_never_offered(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path, labels=7)
    for group in trace_groups(model):
        for member in group.members:
            size = model.model.state_dict()[member.parameter].shape[0]
            assert not (member.dim == 0 and size == 7), member.parameter


def test_tracing_leaves_mode_gradients_and_weights_alone(tmp_path: Path) -> None:
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


def test_attention_of_an_unknown_build_is_refused(tmp_path: Path) -> None:
    model = load_base(
        "timm/vit_tiny_patch16_224", False, model_args={"img_size": 32, "qk_norm": True, "depth": 1}
    ).model
    with pytest.raises(
        UnsupportedArchitectureError, match=r"blocks\.0\.attn \(Attention\) is an attention of an unknown build"
    ):
        trace_groups(model)


def test_a_model_that_cannot_be_followed_is_refused_in_one_line() -> None:
    config = IsoPruneConfig(
        base={"library": "timm", "architecture": "coat_tiny", "args": {}}, num_labels=10, image_size=[3, 224, 224]
    )
    with torch.device("meta"):
        model = IsoPruneForImageClassification(config)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        trace_groups(model)
    assert "\n" not in str(caught.value)
