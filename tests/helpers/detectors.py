"""Tiny networks of object detection with random weights and two classes, for images of 64 x 64 (YOLOS: 32 x 32)."""

import torch
import transformers

_TRANSFORMER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 6,
    "num_labels": 2,
    "dropout": 0.0,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}


def make_yolos() -> transformers.YolosForObjectDetection:
    """Return a YOLOS with 5 queries, for images of 32 x 32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=2)
    return _sharpened(transformers.YolosForObjectDetection(config))


def make_detr() -> transformers.DetrForObjectDetection:
    """Return a DETR with 6 queries on a ResNet of transformers."""
    torch.manual_seed(0)
    config = transformers.DetrConfig(**_TRANSFORMER, backbone_config=_resnet())
    return _sharpened(transformers.DetrForObjectDetection(config))


def _resnet() -> transformers.ResNetConfig:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1]}
    return transformers.ResNetConfig(**sizes, layer_type="basic", out_features=["stage2"])


def make_rt_detr() -> transformers.RTDetrForObjectDetection:
    """Return an RT-DETR with 6 queries."""
    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        encoder_ffn_dim=48,
        encoder_attention_heads=2,
        d_model=32,
        num_queries=6,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_n_points=2,
        num_labels=2,
        num_denoising=0,
    )
    return _sharpened(transformers.RTDetrForObjectDetection(config))


def _sharpened(network: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Enlarge the weights of a network in place, so that its objects differ between images and queries."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1 and "backbone" not in name:
                weight.mul_(4)
    return network.eval()
