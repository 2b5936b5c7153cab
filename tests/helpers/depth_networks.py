"""Tiny networks of depth estimation with random weights, for images of 28 x 28 or 32 x 32."""

import torch
import transformers

_TOWER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}


def make_depth_anything() -> transformers.DepthAnythingForDepthEstimation:
    """Return a Depth Anything on a Dinov2, for images of 28 x 28, whose depths are positive."""
    torch.manual_seed(0)
    settings = {"out_indices": [1, 2, 3, 4], "apply_layernorm": True, "reshape_hidden_states": False}
    backbone = transformers.Dinov2Config(image_size=28, patch_size=14, **_TOWER, **settings)
    sizes = {"patch_size": 14, "reassemble_hidden_size": 32, "head_hidden_size": 8}
    network = transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(backbone_config=backbone, **sizes, **_NECK)
    )
    with torch.no_grad():
        network.head.conv3.weight.abs_().mul_(20)
        network.head.conv3.bias.fill_(0.1)
    return network.eval()


def make_dpt() -> transformers.DPTForDepthEstimation:
    """Return a DPT, for images of 32 x 32."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "intermediate_size": 64, "backbone_out_indices": [0, 1, 2, 3]}
    return transformers.DPTForDepthEstimation(
        transformers.DPTConfig(**_TOWER, **_NECK, **sizes, is_hybrid=False)
    ).eval()


def make_glpn() -> transformers.GLPNForDepthEstimation:
    """Return a GLPN, for images of 32 x 32."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "sr_ratios": [4, 2, 1, 1]}
    config = transformers.GLPNConfig(num_attention_heads=[1, 2, 4, 6], decoder_hidden_size=16, **sizes)
    return transformers.GLPNForDepthEstimation(config).eval()
