from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.pruning.graph.copying import copy_simplified
from isoprune_hf.pruning.graph.torch_pruning.stand_ins import loose_parameters, traced_copy


def test_traced_copy_requires_gradients(tmp_path: Path) -> None:
    base = make_base("swin", tmp_path).half().requires_grad_(False).train().model
    network = traced_copy(base).network
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert base.training and base.head.fc.weight.dtype == torch.float16


def test_loose_parameters_are_tokens_positions_layer_scale(tmp_path: Path) -> None:
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


def test_simplified_copy_still_checks_prelu_width() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(4), nn.GELU(), nn.GLU(1))
    with pytest.raises(RuntimeError):
        copy_simplified(network)(torch.zeros(1, 3, 2, 2, device="meta"))
    network[1] = nn.PReLU(8)
    assert copy_simplified(network)(torch.zeros(1, 3, 2, 2, device="meta")).shape == (1, 4, 2, 2)
