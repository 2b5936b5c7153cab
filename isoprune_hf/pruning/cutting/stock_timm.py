"""Convert ViT and DeiT of timm to transformers: `find_unsupported_part` checks a network, `convert_timm` converts it.

The attributes of timm's modules are read as in timm 1.0; timm does not annotate them, so they are declared here.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeGuard

from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

from isoprune_hf.checkpoint.modeling_isoprune import SkippedBlock
from isoprune_hf.pruning.cutting.stock_sizes import State, StockModel, read_sizes, scale_tensor

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    GELUTanh: "gelu_pytorch_tanh",
    QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


class _Attention(Protocol):
    qkv: nn.Linear
    proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    head_dim: int
    scale: float
    fused_attn: bool


class _Mlp(Protocol):
    fc1: nn.Linear
    fc2: nn.Linear
    act: nn.Module
    norm: nn.Module


class _Block(Protocol):
    attn: _Attention
    mlp: _Mlp
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    ls1: nn.Module
    ls2: nn.Module


class _PatchEmbed(Protocol):
    proj: nn.Conv2d
    norm: nn.Module
    img_size: tuple[int, int]
    patch_size: tuple[int, int]


class TimmViT(Protocol):
    """The parts of a ViT or DeiT of timm that a conversion reads."""

    blocks: nn.Sequential
    patch_embed: _PatchEmbed
    norm: nn.LayerNorm
    norm_pre: nn.Module
    fc_norm: nn.Module
    pos_embed: Tensor | None
    has_class_token: bool
    num_reg_tokens: int
    no_embed_class: bool
    global_pool: str
    dynamic_img_size: bool

    def state_dict(self) -> State:
        """Return the tensors by name."""
        ...


def is_timm_vit(network: nn.Module) -> TypeGuard[TimmViT]:
    """Check whether a network is a ViT or DeiT of timm, and not a subclass of one."""
    return type(network) in (VisionTransformer, VisionTransformerDistilled)


def find_unsupported_part(network: TimmViT) -> str | None:
    """Find a part of a ViT or DeiT of timm without a counterpart in transformers; None if there is none."""
    patches = network.patch_embed
    parts = [
        ("no class token", not network.has_class_token),
        ("register tokens", bool(network.num_reg_tokens)),
        ("no learned position of each token", network.pos_embed is None or network.no_embed_class),
        (f"pooling {network.global_pool!r}", network.global_pool != "token" or not _is_absent(network.fc_norm)),
        ("images of any size", network.dynamic_img_size),
        ("a norm before the blocks", not _is_absent(network.norm_pre)),
        ("no last LayerNorm", not isinstance(network.norm, nn.LayerNorm)),
        ("another patch embedding", not _is_exactly(patches, PatchEmbed) or not _is_absent(patches.norm)),
        ("a patch embedding without bias", patches.proj.bias is None),
        ("other blocks", not all(_is_block(block) for block in _kept_modules(network))),
    ]
    found = next((part for part, is_present in parts if is_present), None)
    return _find_unsupported_block(network) if found is None else found


def _find_unsupported_block(network: TimmViT) -> str | None:
    """Find a part of a block without a counterpart in transformers, or that differs from the first block."""
    blocks = _blocks(network)
    eps = network.norm.eps
    first_act = blocks[0].mlp.act if _is_exactly(blocks[0].mlp, Mlp) else None

    def has_other_activation(block: _Block) -> bool:
        act = block.mlp.act
        if first_act is None or type(first_act) not in _ACTIVATIONS or type(act) not in _ACTIVATIONS:
            return True
        return _activation_name(act) != _activation_name(first_act)

    parts: list[tuple[str, Callable[[_Block], bool]]] = [
        ("another attention", lambda block: not _is_exactly(block.attn, Attention) or block.attn.gate is not None),
        ("norms in its attention", lambda b: not all(map(_is_absent, (b.attn.q_norm, b.attn.k_norm, b.attn.norm)))),
        ("another MLP", lambda block: not _is_exactly(block.mlp, Mlp) or not _is_absent(block.mlp.norm)),
        ("projections without bias", lambda b: any(m.bias is None for m in (b.attn.proj, b.mlp.fc1, b.mlp.fc2))),
        ("an activation of its own", has_other_activation),
        ("norms of its own", lambda b: any(not _is_layer_norm(norm, eps) for norm in (b.norm1, b.norm2))),
    ]
    return next((part for part, is_present in parts if any(is_present(block) for block in blocks)), None)


def convert_timm(network: TimmViT) -> StockModel:
    """Convert a ViT or DeiT without unsupported parts to transformers.

    Raises:
        CheckpointError: The blocks have different sizes.
    """
    blocks = _blocks(network)
    is_distilled = isinstance(network, VisionTransformerDistilled)
    kind: type[ViTConfig] | type[DeiTConfig] = DeiTConfig if is_distilled else ViTConfig
    model_class = DeiTForImageClassificationWithTeacher if is_distilled else ViTForImageClassification
    (height, width), (rows, columns) = network.patch_embed.img_size, network.patch_embed.patch_size
    sizes = read_sizes(
        [block.attn.qkv.out_features // 3 for block in blocks],
        [block.attn.head_dim for block in blocks],
        [block.mlp.fc1 for block in blocks],
    )
    config = kind(
        **sizes._asdict(),
        hidden_size=network.patch_embed.proj.out_channels,
        hidden_act=_activation_name(blocks[0].mlp.act),
        layer_norm_eps=network.norm.eps,
        image_size=height if height == width else [height, width],
        patch_size=rows if rows == columns else [rows, columns],
        num_channels=network.patch_embed.proj.in_channels,
        qkv_bias=blocks[0].attn.qkv.bias is not None,
        architectures=[model_class.__name__],
    )
    prefix = "deit" if is_distilled else "vit"
    state = _convert_embeddings_and_heads(network.state_dict(), prefix, is_distilled=is_distilled)
    for number, block in enumerate(blocks):
        state |= {f"{prefix}.layers.{number}.{name}": tensor for name, tensor in _convert_block(block).items()}
    return StockModel(config, state)


def _convert_embeddings_and_heads(tensors: State, prefix: str, *, is_distilled: bool) -> State:
    """Rename the tensors outside the blocks."""
    names = {
        "cls_token": f"{prefix}.embeddings.cls_token",
        "dist_token": f"{prefix}.embeddings.distillation_token",
        "pos_embed": f"{prefix}.embeddings.position_embeddings",
        "patch_embed.proj": f"{prefix}.embeddings.patch_embeddings.projection",
        "norm": f"{prefix}.layernorm",
        "head": "cls_classifier" if is_distilled else "classifier",
        "head_dist": "distillation_classifier",
    }
    state: State = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name in names:
            state[names[name]] = tensor
        elif module in names:
            state[f"{names[module]}.{leaf}"] = tensor
    return state


def _convert_block(block: _Block) -> State:
    """Rename and convert the tensors of a block."""
    attn = block.attn
    state: State = {}
    # Fused attention takes its scale from the tensors, eager attention from the module.
    factor = 1.0 if attn.fused_attn else attn.scale * attn.head_dim**0.5
    for kind, fused in (("weight", attn.qkv.weight), ("bias", attn.qkv.bias)):
        for part, tensor in zip("qkv", fused.chunk(3) if fused is not None else (), strict=False):
            state[f"attention.{part}_proj.{kind}"] = scale_tensor(tensor, factor) if part == "q" else tensor
    layers: list[tuple[str, nn.Linear | nn.LayerNorm, nn.Module | None]] = [
        ("attention.o_proj", attn.proj, block.ls1),
        ("mlp.fc1", block.mlp.fc1, None),
        ("mlp.fc2", block.mlp.fc2, block.ls2),
        ("layernorm_before", block.norm1, None),
        ("layernorm_after", block.norm2, None),
    ]
    for name, layer, layer_scale in layers:
        gamma = layer_scale.get_parameter("gamma") if isinstance(layer_scale, LayerScale) else None
        state[f"{name}.weight"] = layer.weight if gamma is None else layer.weight * gamma[:, None]
        state[f"{name}.bias"] = layer.bias if gamma is None else layer.bias * gamma
    return state


def _kept_modules(network: TimmViT) -> Iterator[nn.Module]:
    """Iterate over the blocks that were not removed."""
    return (block for block in network.blocks if not isinstance(block, SkippedBlock))


def _blocks(network: TimmViT) -> list[_Block]:
    return [block for block in _kept_modules(network) if _is_block(block)]


def _is_block(module: nn.Module) -> TypeGuard[_Block]:
    return type(module) is Block


def _is_exactly(module: object, kind: type) -> bool:
    """Check the type of a module; a subclass may compute something else."""
    return type(module) is kind


def _is_absent(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _is_layer_norm(module: nn.Module, eps: float) -> bool:
    return isinstance(module, nn.LayerNorm) and module.eps == eps and module.bias is not None


def _activation_name(act: nn.Module) -> str:
    """Return the name of an activation in transformers."""
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_pytorch_tanh"
    return _ACTIVATIONS[type(act)]
