"""A tiny network of semantic segmentation whose pixels have several classes."""

import torch
import transformers

SIZES = {
    "num_encoder_blocks": 2,
    "hidden_sizes": [16, 24],
    "depths": [1, 1],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 3,
    "classifier_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}


_TOWER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 3,
}


def make_upernet() -> transformers.UperNetForSemanticSegmentation:
    """Return an UperNet on a ConvNeXt."""
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = transformers.ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=stages)
    sizes = {"hidden_size": 16, "auxiliary_channels": 8, "pool_scales": [1]}
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, num_labels=3, **sizes)
    )


def make_beit() -> transformers.BeitForSemanticSegmentation:
    """Return a BEiT with the head of UperNet, for images of 32 x 32."""
    settings = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "out_indices": [0, 1, 2, 3]}
    return transformers.BeitForSemanticSegmentation(transformers.BeitConfig(**_TOWER, **settings))


def make_dpt() -> transformers.DPTForSemanticSegmentation:
    """Return a DPT for images of 32 x 32."""
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    return transformers.DPTForSemanticSegmentation(transformers.DPTConfig(**_TOWER, **sizes, is_hybrid=False))


def make_segformer() -> transformers.SegformerForSemanticSegmentation:
    """Return a SegFormer with random weights, for images of 16 x 16; its logits are maps of 8 x 8."""
    torch.manual_seed(0)
    network = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SIZES)).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.mul_(6)
        network.decode_head.classifier.weight.mul_(20)
    return network
