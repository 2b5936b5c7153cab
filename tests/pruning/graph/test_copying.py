from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import FAMILIES, make_base
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from isoprune_hf.pruning.graph.copying import copy_modules, copy_shapes, replace_tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_shapes_is_on_meta_without_hooks(family: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path).model
    handle = base.register_forward_hook(lambda *_: pytest.fail("a hook of the base was called"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    copied = copy_shapes(base)
    assert {name: (t.shape, t.dtype) for name, t in copied.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert {t.device.type for t in [*copied.parameters(), *copied.buffers()]} == {"meta"}
    assert [(name, type(m)) for name, m in copied.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert not {id(module) for module in copied.modules()} & {id(module) for module in base.modules()}
    copied(torch.zeros(1, *make_base(family, tmp_path).config.image_size, device="meta"))
    handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_copy_shapes_keeps_attributes_and_sharing() -> None:
    layer = torch.nn.Linear(4, 4).double()
    layer.weight.requires_grad_(False)
    pair = torch.nn.Sequential(layer, torch.nn.Linear(4, 4), layer)
    pair[1].in_features, pair[1].partner = 3, layer
    copied = copy_shapes(pair)
    assert copied[0] is copied[2] is copied[1].partner
    assert copied[0].weight.dtype == torch.float64 and not copied[0].weight.requires_grad
    assert copied[1].in_features == 3 and copied[1].weight.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_with_tensors_computes_same_logits(family: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path)
    copied = copy_modules(
        base, lambda tensor: nn.Parameter(tensor.clone()) if tensor.requires_grad else tensor.clone()
    )
    image = torch.randn(2, *base.config.image_size)
    assert torch.equal(copied(image).logits, base(image).logits)
    mine = {tensor.data_ptr() for tensor in base.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in copied.state_dict().values()}


def test_copy_without_hooks_collects_hidden_states() -> None:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "decoder_hidden_size": 8}
    config = SegformerConfig(num_attention_heads=[1, 2], sr_ratios=[2, 1], num_labels=3, **sizes)
    network = SegformerForSemanticSegmentation(config).eval()
    image = torch.randn(1, 3, 32, 32)
    wanted = network(image).logits  # transformers sets its hooks at the first pass
    copied = copy_modules(network, lambda tensor: replace_tensor(tensor, tensor.detach()), with_hooks=False)
    assert torch.equal(copied(image).logits, wanted)


def test_copied_hooks_belong_to_the_copy() -> None:
    layer, calls = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda *_: calls.append("called"))
    copied = copy_modules(layer, torch.clone)
    copied.register_forward_hook(lambda *_: calls.append("mine"))
    layer(torch.zeros(1, 2))
    assert calls == ["called"] and type(copied._forward_hooks) is OrderedDict
    calls.clear()
    copied(torch.zeros(1, 2))
    assert calls == ["called", "mine"]


def test_replaced_module_and_its_tensors_are_skipped() -> None:
    gone, stand_in = nn.Linear(2, 3), nn.Identity()
    pair = nn.Sequential(gone, nn.ReLU())
    asked = []
    copied = copy_modules(pair, lambda tensor: asked.append(tensor) or tensor, replaced={gone: stand_in})
    assert copied[0] is stand_in and asked == [] and pair[0] is gone
