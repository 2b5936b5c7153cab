"""Files as the reference implementation writes them: modules that are cut and pickled whole."""

from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
import torchvision
from helpers.tiny_models import SWIN, TIMM, VIT
from timm.models.swin_transformer import PatchMerging, WindowAttention
from timm.models.vision_transformer import Attention
from torch import nn

from isoprune_hf.models import load_base
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe

NAMES = {
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "convnext": ("convnext_atto", {"depths": [1, 1, 3, 1], "dims": [16, 24, 32, 40], "conv_mlp": False}),
    "resnet": ("resnet50", TIMM["resnet"][1]),
}


def make_module(family: str, **options: Any) -> nn.Module:
    """Build a tiny module with weights that leave no part of the network idle."""
    torch.manual_seed(0)
    if family == "mobilenet_v2":
        module = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25)
    else:
        name, args = NAMES[family]
        args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
        module = timm.create_model(name, num_classes=10, **args, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                scale = 1.0 if tensor.ndim == 1 or "token" in name or "pos" in name else tensor[0].numel() ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return module.eval()


def cut(module: nn.Module, images: torch.Tensor, *, ratio: float = 0.5, head_ratio: float = 0.5) -> nn.Module:
    """Cut a module in place as `prune.py` of the reference does it, attributes included."""
    ignored: list[Any] = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features in (10, 1000)]
    attentions = [m for m in module.modules() if isinstance(m, Attention)]
    pruner = tp.pruner.BasePruner(
        module,
        example_inputs=images,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={m.qkv: m.num_heads for m in attentions},
        prune_head_dims=True,
        prune_num_heads=True,
        head_pruning_ratio=head_ratio,
        round_to=2,
    )
    pruner.step()
    for part in attentions:
        part.num_heads = pruner.num_heads[part.qkv]
        head_dim = part.qkv.out_features // (3 * part.num_heads)
        part.scale = head_dim**-0.5
        part.head_dim = head_dim
    module.zero_grad()
    return module.eval()


def cut_swin(**options: Any) -> nn.Module:
    """Cut a tiny Swin with the engine `axes`, as torch-pruning cannot; attributes are as stale as in the reference."""
    module = make_module("swin", **options)
    base = load_base("timm/swin_tiny_patch4_window7_224", False, model_args=SWIN, num_labels=10).model
    base.model.load_state_dict(module.state_dict())
    pruned = prune_model(base, PruneRecipe(criterion="l1", ratio=0.5, head_ratio=0.0, head_dim_ratio=0.5)).model.model
    for path, part in pruned.named_modules():
        if isinstance(part, PatchMerging | WindowAttention):
            old = module.get_submodule(path)
            part.dim, part.out_dim = old.dim, getattr(old, "out_dim", None)
    return pruned.eval()


def save(content: Any, path: Path) -> Path:
    """Write a file of torch.save."""
    torch.save(content, path)
    return path


@torch.no_grad()
def run(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Run an old module. The reference patches its attention to take any width; current timm derives the width."""
    for part in module.modules():
        if isinstance(part, Attention):
            part.attn_dim = part.num_heads * part.head_dim
    return module.eval()(images)
