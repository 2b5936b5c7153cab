import timm
import torch
from coverage_anchor import LABELS
from coverage_reduce import Architecture, fewer_blocks, reduce, timm_arguments, variants
from torch import nn


class Net(nn.Module):
    """Reads images of `size` pixels and has at least two blocks."""

    def __init__(self, depths: list[int], size: int, classes: int = LABELS):
        super().__init__()
        if len(depths) != 2 or sum(depths) < 4:
            raise TypeError("too few blocks")
        self.size, self.num_classes = size, classes
        self.blocks = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(sum(depths))))
        self.head = nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] != self.size:
            raise ValueError("wrong size")
        return self.head(self.blocks(images).mean((2, 3)))


def test_depths_keep_two_blocks_in_the_deepest_stage() -> None:
    assert fewer_blocks((3, 4, 18, 3), 1, 2) == [1, 1, 2, 1]
    assert fewer_blocks([[1, 5, 0], [1, 2, 3]], 1, 2) == [[1, 2, 0], [1, 1, 2]]
    assert fewer_blocks(12, 1, 2) == 2


def test_variants_end_with_the_model_as_it_is() -> None:
    arguments = {"depths": (2, 6), "embed_dim": 64, "layers": nn.Linear, "num_blocks": True}
    assert list(variants(arguments)) == [{"depths": [1, 2]}, {"depths": [2, 2]}, {"depths": [2, 4]}, {}]


def test_reduction_is_the_first_that_runs() -> None:
    def build(args: dict) -> nn.Module:
        return Net(**({"depths": [3, 3], "size": 128} | args))

    row = reduce(Architecture("net", build, {"depths": [3, 3]}, "size", 128))
    assert row == {"family": "net", "params": 0.0, "args": {"depths": [2, 2], "size": 64}, "side": 64}
    row = reduce(Architecture("net", build, {}, None, 128))
    assert row == {"family": "net", "params": 0.0, "args": {}, "side": 128}


def test_variant_runs_in_train_mode() -> None:
    class Trained(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training and images.shape[-1] < 112:
                raise ValueError("too few pixels for the auxiliary head")
            return self.head(self.blocks(images).mean((2, 3)))

    row = reduce(Architecture("net", lambda args: Trained([2, 2], 64), {}, None, 224))
    assert row["side"] == 112


def test_network_without_head_has_a_reason() -> None:
    row = reduce(Architecture("net", lambda args: Net([2, 2], 64, classes=3), {}, None, 64))
    assert "returns features" in row["reason"] and "args" not in row


def test_network_that_is_not_built_has_a_reason() -> None:
    row = reduce(Architecture("net", lambda args: Net([1], 64), {}, None, 64))
    assert "too few blocks" in row["reason"]


def test_arguments_of_timm_are_those_of_the_builder() -> None:
    assert list(timm_arguments("resnet50")["layers"]) == [3, 4, 6, 3]
    assert timm_arguments("vit_tiny_patch16_224")["depth"] == 12


def test_arguments_of_timm_include_fields_of_configs() -> None:
    assert timm_arguments("regnety_032")["depth"] == 21
    assert isinstance(timm.create_model("test_vit"), nn.Module)  # the builders are as before
