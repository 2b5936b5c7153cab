"""A vision transformer whose query heads share heads of keys and values."""

import timm
import torch
from helpers.traced_models import make_timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification

QUERIES, KEYS, DIMS, WIDTH = 6, 2, 4, 20  # query heads, key and value heads, dims of a head, stream


class GroupedQueryAttention(nn.Module):
    """Attention as timm's AttentionRope computes it, without positions and norms."""

    def __init__(self, dim: int, num_kv_heads: int, **_: object) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = QUERIES, num_kv_heads, DIMS
        self.num_kv_groups = QUERIES // num_kv_heads
        self.attn_dim, self.kv_dim, self.scale = QUERIES * DIMS, num_kv_heads * DIMS, DIMS**-0.5
        self.q_proj, self.k_proj = nn.Linear(dim, self.attn_dim), nn.Linear(dim, self.kv_dim, bias=False)
        self.v_proj, self.proj = nn.Linear(dim, self.kv_dim), nn.Linear(self.attn_dim, dim)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False):
        batch, tokens, _ = x.shape
        q = self.q_proj(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).reshape(batch, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).reshape(batch, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2)
        k, v = (part.repeat_interleave(self.num_kv_groups, dim=1) for part in (k, v))
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, self.attn_dim))


@timm.models.register_model
def grouped_query_vit(num_classes: int = 1000, num_kv_heads: int = KEYS, **_: object) -> VisionTransformer:
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=1, num_classes=num_classes, mlp_ratio=2
    )
    for block in model.blocks:
        block.attn = GroupedQueryAttention(WIDTH, num_kv_heads)
    return model


def make_model(**args: int) -> IsoPruneForImageClassification:
    model = make_timm("grouped_query_vit", 16, **args).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            scale = 1.0 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * scale)
    return model
