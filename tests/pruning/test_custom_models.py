"""Networks that a user wrote: opened through a registered class or builder, saved, pruned and opened again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from helpers.fresh_python import FreshPython
from helpers.oracles import make_images, mask_error, permutation_error, prunable_share, randomize
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe


class SplitBlock(nn.Module):
    """A block that processes two halves of the channels separately and concatenates them in reverse order."""

    def __init__(self, width: int):
        super().__init__()
        self.left, self.right = (nn.Conv2d(width // 2, width // 2, 3, padding=1) for _ in range(2))
        self.join, self.norm = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        left, right = hidden.chunk(2, dim=1)
        joined = torch.cat([self.right(right).relu(), self.left(left).relu()], dim=1)
        return hidden + self.norm(self.join(joined))


class Attention(nn.Module):
    """Attention whose heads are split by views, einsum or einops, as `how` selects."""

    def __init__(self, width: int, heads: int, how: str):
        super().__init__()
        self.heads, self.how = heads, how
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = hidden.shape
        query, key, value = self.to_qkv(hidden).chunk(3, dim=-1)
        if self.how == "view":
            shape = (batch, tokens, self.heads, width // self.heads)
            query, key, value = (part.view(shape).transpose(1, 2) for part in (query, key, value))
        else:  # as einops does: "b n (h d) -> b h n d"
            query, key, value = (part.unflatten(-1, (self.heads, -1)).movedim(2, 1) for part in (query, key, value))
        if self.how == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[-1] ** -0.5
            output = torch.einsum("bhij,bhjd->bihd", weights.softmax(-1), value).flatten(2)
        else:
            weights = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            output = (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.to_out(output)


class Layer(nn.Module):
    def __init__(self, width: int, how: str):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, 2, how)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.down(nn.functional.gelu(self.up(self.norm2(hidden))))


class OwnNet(nn.Module):
    def __init__(self, num_classes: int, width: int, how: str):
        super().__init__()
        self.num_classes, self.is_conv = num_classes, how == "split"
        self.stem = nn.Conv2d(3, width, 4, 4)
        blocks = [SplitBlock(width) if self.is_conv else Layer(width, how) for _ in range(2)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images)
        if self.is_conv:
            return self.head(self.blocks(hidden).mean((2, 3)))
        return self.head(self.blocks(hidden.flatten(2).transpose(1, 2)).mean(1))


class OwnConfig(PreTrainedConfig):
    model_type = "isoprune_test_own_net"
    image_size: int = 32
    width: int = 32
    how: str = "split"


class OwnForImageClassification(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.net = OwnNet(config.num_labels, config.width, config.how)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.net(pixel_values))


def register() -> None:
    AutoConfig.register(OwnConfig.model_type, OwnConfig, exist_ok=True)
    AutoModelForImageClassification.register(OwnConfig, OwnForImageClassification, exist_ok=True)


@timm.models.register_model
def isoprune_test_own_net(
    num_classes: int = 1000, width: int = 32, how: str = "split", bare: int = 0, **_: object
) -> nn.Module:
    net = OwnNet(num_classes, width, how)
    if not bare:
        net.pretrained_cfg = {"input_size": (3, 32, 32), "num_classes": num_classes}
    return net


@pytest.fixture(params=["transformers", "timm"])
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    register()
    yield request.param


HOW = ("split", "view", "einsum", "einops")


def open_own(library: str, how: str, folder: Path) -> tuple[IsoPruneForImageClassification, object]:
    if library == "timm":
        base = load_base("timm/isoprune_test_own_net", False, model_args={"how": how}, num_labels=5)
    else:
        OwnForImageClassification(OwnConfig(how=how, num_labels=5)).save_pretrained(folder)
        base = load_base(str(folder))
    randomize(base.model)
    return base.model, base.processor


@pytest.mark.parametrize("how", HOW)
def test_custom_network_reloads_bit_equal(library: str, how: str, tmp_path: Path) -> None:
    model, processor = open_own(library, how, tmp_path / "own")
    save_model_folder(tmp_path / "dense", model, processor)
    again = load_base(str(tmp_path / "dense")).model
    images = make_images(model)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize("how", HOW)
def test_custom_network_passes_all_stages(library: str, how: str, tmp_path: Path) -> None:
    model, processor = open_own(library, how, tmp_path / "own")
    images, groups = make_images(model), trace_groups(model)
    assert prunable_share(model, groups) > 0.95
    assert permutation_error(model, groups, images) <= 1e-9
    recipe = PruneRecipe(criterion="l1", ratio=0.5, round_to=2)
    plan = make_plan(groups, score_groups(model, groups, criterion="l1"), recipe)
    pruned = apply_plan(model, plan, groups)
    assert mask_error(model, pruned, groups, plan, images) <= 1e-9
    save_model_folder(tmp_path / "pruned", pruned, processor, plan=plan.to_json())
    again = IsoPruneForImageClassification.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(images).logits, pruned(images).logits)


def test_folder_of_unregistered_class_names_its_import(fresh_python: FreshPython, tmp_path: Path) -> None:
    register()
    model, processor = open_own("transformers", "split", tmp_path / "own")
    save_model_folder(tmp_path / "dense", model, processor)
    code = f"from isoprune_hf import load_base; load_base({str(tmp_path / 'dense')!r})"
    child = fresh_python.run(code)
    assert "import the module that registers it" in child.stderr.splitlines()[-1]


def test_builder_with_missing_attributes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"isoprune_test_own_net has no pretrained_cfg"):
        load_base("timm/isoprune_test_own_net", False, model_args={"bare": 1})
