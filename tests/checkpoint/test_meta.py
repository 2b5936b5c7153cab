"""Networks whose constructors compute values are built on the meta device, and open with these values."""

import json
from pathlib import Path

import pytest
import timm
import torch
from helpers.fresh_python import FreshPython
from helpers.tiny_models import make_base
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isoprune_hf import load_base
from isoprune_hf.checkpoint.dense import IsoPruneConfig, build_base
from isoprune_hf.checkpoint.meta import build_on_meta, move_to_meta
from isoprune_hf.checkpoint.structure import meta_copy

# A network with buffers that are not saved, tensors in attributes and containers, and values read while it is built.
NETWORK = """
import timm, torch
from torch import nn

class Turned(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.num_classes = num_classes
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, num_classes)
        self.rates = [rate.item() for rate in torch.linspace(0.1, 0.3, 3)] + torch.ones(2).numpy().tolist()
        self.register_buffer("sine", torch.arange(16.0).sin(), persistent=False)
        self.register_buffer("cosine", self.on_device_of(self.stem.weight), persistent=False)
        self.register_buffer("saved", torch.full((16,), 2.0))
        self.plain, self.nested = torch.linspace(0, 1, 16), {"deep": [(torch.full((16,), 3.0),)]}

    @staticmethod
    def on_device_of(weight):
        return torch.arange(16.0, device=weight.device).cos()

    def forward(self, x):
        x = self.stem(x).mean((2, 3)) * self.sine + self.cosine * self.saved + self.plain
        return self.head(x * sum(self.rates) + self.nested["deep"][0][0])

def isoprune_turned(num_classes=5, **_):
    network = Turned(num_classes)
    network.pretrained_cfg = {"input_size": (3, 16, 16), "num_classes": num_classes}
    return network

isoprune_turned.__module__ = "__main__"
"""
REGISTERED = (
    NETWORK
    + "\nimport sys\nvars(sys.modules['__main__'])['isoprune_turned'] = isoprune_turned\n"
    + ("timm.models.register_model(isoprune_turned)\n")
)
ELSEWHERE = (
    REGISTERED
    + """
import json
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(model(torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).logits.tolist()))
"""
)
IMAGE = torch.linspace(-1, 1, 768).view(1, 3, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    exec(REGISTERED, {})


def meta_network() -> nn.Module:
    base = {"library": "timm", "architecture": "isoprune_turned", "args": {}}
    with torch.device("meta"):
        return build_base(IsoPruneConfig(base=base, num_labels=5, image_size=[3, 16, 16]))


def test_only_saved_tensors_are_on_meta() -> None:
    before = torch.get_rng_state()
    network, real = meta_network(), timm.create_model("isoprune_turned")
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert network.state_dict().keys() == real.state_dict().keys()
    assert network.rates == real.rates
    for name in ("sine", "cosine", "plain"):
        assert torch.equal(getattr(network, name), getattr(real, name))
    assert torch.equal(network.nested["deep"][0][0], real.nested["deep"][0][0])
    fresh = torch.get_rng_state()
    torch.set_rng_state(before)
    timm.create_model("isoprune_turned")
    assert torch.equal(torch.get_rng_state(), fresh)  # only the real network has drawn numbers


class Calls(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("family", ["vit", "mobilenet_v2", "hf-swin"])
def test_no_weights_are_drawn_on_meta(family: str, tmp_path: Path) -> None:
    config = make_base(family, tmp_path).config
    with Calls() as real:
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in build_base(config).state_dict().items()}
    with Calls() as calls, torch.device("meta"):
        network = build_base(config)
    drawing = {"uniform_", "normal_", "erfinv_", "clamp_"}
    assert drawing & real.names and not drawing & calls.names
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()} == shapes


def test_moved_network_runs_on_meta() -> None:
    network = move_to_meta(meta_network())
    assert network(IMAGE.to("meta")).is_meta
    model = load_base("timm/isoprune_turned", pretrained=False).model
    assert meta_copy(model)(IMAGE.to("meta")).logits.is_meta
    assert not model.model.nested["deep"][0][0].is_meta


def test_shared_parameter_stays_shared_on_meta() -> None:
    def build() -> nn.Module:
        network = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        shared = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        network[0].weight, network[1].weight = shared, shared
        network.rates = torch.linspace(0, 1, 3).tolist()
        return network

    with torch.device("meta"):
        network = build_on_meta(build)
    assert network[0].weight is network[1].weight and network[0].weight.is_meta
    assert not network[0].weight.requires_grad


def test_unsaved_tables_of_gigabytes_are_refused() -> None:
    def build() -> nn.Module:
        network = nn.Linear(3, 3)
        network.register_buffer("table", torch.zeros(2**30), persistent=False)
        return network

    with torch.device("meta"), pytest.raises(ValueError, match=r"^buffers of 4,294,967,296 bytes"):
        build_on_meta(build)


def test_unsaved_tensors_open_with_their_values(fresh_python: FreshPython, tmp_path: Path) -> None:
    base = load_base("timm/isoprune_turned", pretrained=False)
    base.model.save_pretrained(tmp_path)
    base.processor.save_pretrained(tmp_path)
    again = load_base(str(tmp_path)).model
    with torch.no_grad():
        expected = base.model(IMAGE).logits
        assert torch.equal(again(IMAGE).logits, expected)
    done = fresh_python.run(ELSEWHERE, tmp_path, absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected)
