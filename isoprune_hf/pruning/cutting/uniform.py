"""A pruned ViT or DeiT whose blocks are all of one size, as the model of transformers that it then is."""

import copy
from collections.abc import Callable, Sequence

import torch
from timm.layers import Attention, GELUTanh, LayerScale, Mlp, PatchEmbed, QuickGELU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
)

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification, SkippedBlock
from isoprune_hf.errors import CheckpointError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.pruning.cost.macs import count_cost

_TIMM = (VisionTransformer, VisionTransformerDistilled)
_TRANSFORMERS = (ViTForImageClassification, DeiTForImageClassification, DeiTForImageClassificationWithTeacher)
_ACTIVATIONS = {nn.GELU: "gelu", GELUTanh: "gelu_pytorch_tanh", QuickGELU: "quick_gelu"}
_ACTIVATIONS |= {nn.SiLU: "silu", nn.ReLU: "relu"}
_TOLERANCE = 1e-5
_IMAGES = 2
State = dict[str, torch.Tensor]


def check_family(model: IsoPruneForImageClassification) -> None:
    """Check that a model of equal blocks can be one of transformers; reads no weights.

    Raises:
        RecipeError: It cannot; names the part.
    """
    network = model.model
    if type(network) not in (*_TIMM, *_TRANSFORMERS):
        raise RecipeError(
            f"prune.layout uniform is for ViT and DeiT of timm and of transformers, and this is a "
            f"{type(network).__name__}; leave prune.layout at per-layer"
        )
    part = _foreign_part(network) if type(network) in _TIMM else None
    if part is not None:
        raise RecipeError(
            f"prune.layout uniform: this {type(network).__name__} has {part}, which ViT and DeiT of transformers have "
            "not; leave prune.layout at per-layer"
        )


def to_stock(
    pruned: IsoPruneForImageClassification, images: torch.Tensor | None = None
) -> IsoPruneForImageClassification:
    """Make the stock model of transformers that a cut ViT or DeiT with equal blocks is.

    A fused projection of queries, keys and values becomes three, layer scale goes into the weights before it, blocks
    that were removed leave the list.

    Args:
        pruned: The cut model; left untouched.
        images: Images (B, C, H, W) on which both models must agree; drawn when not given.

    Returns:
        Our wrapper around the stock model, with no structure: its config names the sizes. Cost, source, recipe and
        stage are those of `pruned`.

    Raises:
        RecipeError: It is of another family.
        CheckpointError: Its blocks are of unlike sizes.
        UnsupportedArchitectureError: The logits differ by more than 1e-5 of the largest.
    """
    check_family(pruned)
    network = pruned.model
    config, state = _convert_timm(network) if type(network) in _TIMM else _convert_transformers(network)
    values = config.to_diff_dict() | {"model_type": config.model_type}
    kept = ("source", "cost", "recipe", "stage", "image_size", "id2label")
    outer = IsoPruneConfig(
        base={"library": "transformers", "config": values},
        layout="uniform",
        **{name: copy.deepcopy(getattr(pruned.config, name)) for name in kept},
    )
    named = {f"model.{name}": tensor.detach().clone() for name, tensor in state.items()}
    stock = IsoPruneForImageClassification.from_pretrained(None, config=outer, state_dict=named, dtype=pruned.dtype)
    stock = stock.to(pruned.device).eval()
    _check_logits(pruned, stock, images)
    if stock.config.cost is not None:  # layer scale has gone
        stock.config.cost = {**stock.config.cost, "pruned": count_cost(stock).to_dict()}
    return stock.train(pruned.training)


def _check_logits(
    pruned: IsoPruneForImageClassification, stock: IsoPruneForImageClassification, images: torch.Tensor | None
) -> None:
    if images is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(_IMAGES, *pruned.config.image_size, generator=generator)
    images, was_training = images[:_IMAGES].to(pruned.device), pruned.training
    pruned.eval()
    with torch.no_grad():
        expected, found = pruned(images).logits.float(), stock(images).logits.float()
    pruned.train(was_training)
    difference = ((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    if not difference <= _TOLERANCE:
        raise UnsupportedArchitectureError(
            f"prune.layout uniform: {type(stock.model).__name__} gives logits that differ by {difference:.1e} of the "
            f"largest, more than {_TOLERANCE:.0e}; leave prune.layout at per-layer"
        )


def _foreign_part(network: VisionTransformer) -> str | None:
    """What a ViT or DeiT of timm has that those of transformers have not."""
    blocks = [block for block in network.blocks if not isinstance(block, SkippedBlock)]
    first = blocks[0]
    patches = network.patch_embed
    checks: list[tuple[str, bool]] = [
        ("no class token", not network.has_class_token),
        ("register tokens", bool(network.num_reg_tokens)),
        ("no learned position of each token", network.pos_embed is None or network.no_embed_class),
        (f"pooling {network.global_pool!r}", network.global_pool != "token" or not _is_none(network.fc_norm)),
        ("images of any size", network.dynamic_img_size),
        ("a norm before the blocks", not _is_none(network.norm_pre)),
        ("no last LayerNorm", not isinstance(network.norm, nn.LayerNorm)),
        ("another patch embedding", type(patches) is not PatchEmbed or not _is_none(patches.norm)),
        ("a patch embedding without bias", patches.proj.bias is None),
        ("other blocks", any(type(block) is not Block for block in blocks)),
    ]
    found = next((name for name, holds in checks if holds), None)
    if found is not None:
        return found
    eps, act = network.norm.eps, _activation(first.mlp)
    per_block: list[tuple[str, Callable[[Block], bool]]] = [
        ("another attention", lambda block: type(block.attn) is not Attention or block.attn.gate is not None),
        ("norms in its attention", lambda b: not all(map(_is_none, (b.attn.q_norm, b.attn.k_norm, b.attn.norm)))),
        ("another MLP", lambda block: type(block.mlp) is not Mlp or not _is_none(block.mlp.norm)),
        ("projections without bias", lambda b: any(m.bias is None for m in (b.attn.proj, b.mlp.fc1, b.mlp.fc2))),
        ("an activation of its own", lambda block: act is None or _activation(block.mlp) != act),
        ("norms of its own", lambda block: any(not _is_norm(norm, eps) for norm in (block.norm1, block.norm2))),
    ]
    return next((name for name, holds in per_block if any(holds(block) for block in blocks)), None)


def _is_none(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _is_norm(module: nn.Module, eps: float) -> bool:
    return isinstance(module, nn.LayerNorm) and module.eps == eps and module.bias is not None


def _activation(mlp: nn.Module) -> str | None:
    act = getattr(mlp, "act", None)
    tanh = isinstance(act, nn.GELU) and act.approximate == "tanh"
    return "gelu_pytorch_tanh" if tanh else _ACTIVATIONS.get(type(act))


def _equal(name: str, sizes: Sequence[int]) -> int:
    if len(set(sizes)) != 1:
        raise CheckpointError(f"layout uniform: the blocks have unlike {name}: {list(sizes)}")
    return sizes[0]


def _sizes(queries: Sequence[int], dims: Sequence[int], mlps: Sequence[nn.Linear]) -> dict[str, int]:
    """Sizes of a stock config, from the width of the queries, the dims of a head and the MLP of each block."""
    head_dim = _equal("head dims", dims)
    return {
        "num_hidden_layers": len(dims),
        "head_dim": head_dim,
        "num_attention_heads": _equal("heads", queries) // head_dim,
        "intermediate_size": _equal("MLP widths", [layer.out_features for layer in mlps]),
    }


def _convert_timm(network: VisionTransformer) -> tuple[PreTrainedConfig, State]:
    blocks = [block for block in network.blocks if not isinstance(block, SkippedBlock)]
    first, old = blocks[0], network.state_dict()
    is_distilled = isinstance(network, VisionTransformerDistilled)
    kind, prefix = (DeiTConfig, "deit") if is_distilled else (ViTConfig, "vit")
    made = DeiTForImageClassificationWithTeacher if is_distilled else ViTForImageClassification
    (height, width), (rows, columns) = network.patch_embed.img_size, network.patch_embed.patch_size
    config = kind(
        **_sizes(
            [block.attn.qkv.out_features // 3 for block in blocks],
            [block.attn.head_dim for block in blocks],
            [block.mlp.fc1 for block in blocks],
        ),
        hidden_size=network.patch_embed.proj.out_channels,
        hidden_act=_activation(first.mlp),
        layer_norm_eps=network.norm.eps,
        image_size=height if height == width else [height, width],
        patch_size=rows if rows == columns else [rows, columns],
        num_channels=network.patch_embed.proj.in_channels,
        qkv_bias=first.attn.qkv.bias is not None,
        architectures=[made.__name__],
    )
    names = {
        "cls_token": f"{prefix}.embeddings.cls_token",
        "dist_token": f"{prefix}.embeddings.distillation_token",
        "pos_embed": f"{prefix}.embeddings.position_embeddings",
        "patch_embed.proj": f"{prefix}.embeddings.patch_embeddings.projection",
        "norm": f"{prefix}.layernorm",
        "head": "cls_classifier" if is_distilled else "classifier",
        "head_dist": "distillation_classifier",
    }
    state = {}
    for name, tensor in old.items():
        module, _, leaf = name.rpartition(".")
        if name in names:
            state[names[name]] = tensor
        elif module in names:
            state[f"{names[module]}.{leaf}"] = tensor
    for number, block in enumerate(blocks):
        state |= {f"{prefix}.layers.{number}.{name}": tensor for name, tensor in _convert_block(block).items()}
    return config, state


def _convert_block(block: Block) -> State:
    """Tensors of a block of timm under the names of transformers."""
    attn, state = block.attn, {}
    # Fused attention takes its scale from the tensors, eager attention from the module.
    factor = 1.0 if attn.fused_attn else attn.scale * attn.head_dim**0.5
    for kind, layer in (("weight", attn.qkv.weight), ("bias", attn.qkv.bias)):
        for part, tensor in zip("qkv", layer.chunk(3) if layer is not None else (), strict=False):
            state[f"attention.{part}_proj.{kind}"] = _scaled(tensor, factor) if part == "q" else tensor
    for name, layer, scale in (
        ("attention.o_proj", attn.proj, block.ls1),
        ("mlp.fc1", block.mlp.fc1, None),
        ("mlp.fc2", block.mlp.fc2, block.ls2),
        ("layernorm_before", block.norm1, None),
        ("layernorm_after", block.norm2, None),
    ):
        gamma = scale.gamma if isinstance(scale, LayerScale) else None
        state[f"{name}.weight"] = layer.weight if gamma is None else layer.weight * gamma[:, None]
        state[f"{name}.bias"] = layer.bias if gamma is None else layer.bias * gamma
    return state


def _convert_transformers(network: nn.Module) -> tuple[PreTrainedConfig, State]:
    body = network.vit if isinstance(network, ViTForImageClassification) else network.deit
    old, layers = network.state_dict(), [layer for layer in body.layers if not isinstance(layer, SkippedBlock)]
    config = copy.deepcopy(network.config)
    sizes = _sizes(
        [layer.attention.q_proj.out_features for layer in layers],
        [layer.attention.head_dim for layer in layers],
        [layer.mlp.fc1 for layer in layers],
    )
    hidden = body.embeddings.patch_embeddings.projection.out_channels
    # The pooler is for other tasks: a classifier has none.
    for name, value in {**sizes, "hidden_size": hidden, "pooler_output_size": hidden}.items():
        setattr(config, name, value)
    config.architectures = [type(network).__name__]
    prefix = f"{network.base_model_prefix}.layers."
    state = {name: tensor for name, tensor in old.items() if not name.startswith(prefix)}
    for number, layer in enumerate(layers):
        factor = layer.attention.scaling * layer.attention.head_dim**0.5
        for name, tensor in layer.state_dict().items():
            is_query = name.startswith("attention.q_proj.")
            state[f"{prefix}{number}.{name}"] = _scaled(tensor, factor) if is_query else tensor
    return config, state


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if abs(factor - 1) < 1e-9 else tensor * factor
