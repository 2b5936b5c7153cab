"""Kernels of ONNX Runtime and the layers that they compute."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base

from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.measuring.onnx_profile import Kernel, Node, assign_kernels, time_onnx_layers


def node(op: str, name: str, inputs: str, scope: str) -> Node:
    """Return an operation whose value is named `v_<name>`."""
    return Node(op, name, inputs.split(), [f"v_{name}"], ["", "model.model", f"model.model.{scope}", "call"])


# A residual block: conv2 is fused with norm, sum and activation; the shortcut has a convolution of its own.
BLOCK = [
    node("Conv", "c1", "pixels", "conv1"),
    node("Clip", "a1", "v_c1 low high", "act1"),
    node("Conv", "c2", "v_a1 model.model.conv2.weight", "norm2"),  # merged with the norm by the exporter
    node("Identity", "n2", "v_c2", "norm2"),
    node("Conv", "cs", "pixels", "shortcut"),
    node("Add", "sum", "v_cs v_n2", "block"),
    node("Relu", "a2", "v_sum", "act2"),
    node("MatMul", "fc", "v_a2 kernel", "attn.qkv"),
    node("Softmax", "soft", "v_fc", "attn"),
]
LAYERS = {"conv1", "conv2", "shortcut", "attn", "attn.qkv"}


@pytest.mark.parametrize(
    ("kernel", "layer"),
    [
        (Kernel("v_a1_nchwc", "Conv"), "conv1"),
        (Kernel("v_cs_nchwc", "Conv"), "shortcut"),
        (Kernel("v_a2_nchwc", "Conv"), "conv2"),
        (Kernel("fc/MatMulScaleFusion/", "FusedMatMul"), "attn.qkv"),
        (Kernel("soft", "Softmax"), "attn"),
        (Kernel("a1", "Clip"), None),
        (Kernel("ReorderOutput", "ReorderOutput"), None),
    ],
)
def test_fused_kernel_belongs_to_its_product(kernel: Kernel, layer: str | None) -> None:
    others = [Kernel("v_a1_nchwc", "Conv"), Kernel("v_cs_nchwc", "Conv")]
    assert assign_kernels([kernel, *others], BLOCK, LAYERS)[0] == layer


@pytest.mark.export
@pytest.mark.parametrize("family", ["mobilenet_v2", "vit"])
def test_every_layer_of_a_network_takes_time(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path).eval()
    products = (torch.nn.Conv2d, torch.nn.Linear)
    layers = [name for name, module in model.model.named_modules() if isinstance(module, products)]
    times = time_onnx_layers(model, image_size_of(model), layers, batch_size=32, threads=1, repeats=2)
    assert {name for name, time in times.layers.items() if time == 0} == set()
    assert sum(times.layers.values()) < times.total
