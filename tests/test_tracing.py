from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, make_base

from isoprune_hf.pruning.tracing import copy_shapes, loose_parameters, traced_copy


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_shapes_has_every_tensor_of_the_model_on_meta_and_none_of_its_hooks(
    family: str, tmp_path: Path
) -> None:
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


def test_a_copy_of_shapes_keeps_what_was_set_and_shares_what_was_shared() -> None:
    layer = torch.nn.Linear(4, 4).double()
    layer.weight.requires_grad_(False)
    pair = torch.nn.Sequential(layer, torch.nn.Linear(4, 4), layer)
    pair[1].in_features, pair[1].partner = 3, layer
    copied = copy_shapes(pair)
    assert copied[0] is copied[2] is copied[1].partner
    assert copied[0].weight.dtype == torch.float64 and not copied[0].weight.requires_grad
    assert copied[1].in_features == 3 and copied[1].weight.requires_grad


def test_what_is_traced_asks_for_gradients_whatever_the_base_does(tmp_path: Path) -> None:
    base = make_base("swin", tmp_path).half().requires_grad_(False).train().model
    network = traced_copy(base).network
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert base.training and base.head.fc.weight.dtype == torch.float16


def test_loose_parameters_are_tokens_positions_and_layer_scale(tmp_path: Path) -> None:
    network = make_base("vit", tmp_path).model
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(parameter)]: dim for parameter, dim in loose_parameters(network)} == {
        "cls_token": 2,
        "pos_embed": 2,
        "blocks.0.ls1.gamma": 0,
        "blocks.0.ls2.gamma": 0,
        "blocks.1.ls1.gamma": 0,
        "blocks.1.ls2.gamma": 0,
    }
