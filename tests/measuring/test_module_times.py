"""Time of a pass by type of module."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from isoprune_hf.measuring.module_times import _add_up, share_of_modules


def event(name: str, time: float, *children: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(name=name, cpu_time_total=time, cpu_children=list(children))


def test_time_of_a_module_excludes_modules_inside() -> None:
    inner = [event("module:Conv2d", 4.0), event("module:Conv2d", 2.0), event("module:ReLU", 1.0)]
    outer = event("module:Block", 10.0, inner[0], event("aten::add", 3.0, inner[1]), inner[2])
    shares = _add_up([outer, *inner, event("aten::add", 3.0)], "cpu_time_total")
    assert shares == pytest.approx({"Conv2d": 0.6, "Block": 0.3, "ReLU": 0.1})
    assert list(shares) == ["Conv2d", "Block", "ReLU"]


def test_every_type_of_a_pass_is_found() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()).eval()
    shares = share_of_modules(model, (3, 8, 8))
    assert shares.keys() == {"Sequential", "Conv2d", "depthwise Conv2d", "ReLU"}
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.is_inference_mode_enabled()
