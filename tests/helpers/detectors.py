"""Tiny networks of object detection with random weights and two classes, for images of 64 x 64 (YOLOS: 32 x 32)."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_SIZES = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 6, "num_labels": 2, **_HEADS}
_DETR = {**_SIZES, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}
_CHANNELS = [16, 24, 32]  # of the last three stages of a backbone
_RT_DETR = {
    **_SIZES,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": _CHANNELS,
    "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 2,
    "num_denoising": 0,
}
_LATE = {"d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 2, "num_queries": 6, "group_detr": 2, "num_labels": 2}
_LATE |= {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
_TOWER |= {"out_indices": [1, 2]}
_THREE = ["stage2", "stage3", "stage4"]


def make_yolos() -> transformers.YolosForObjectDetection:
    """Return a YOLOS with 5 queries, for images of 32 x 32."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=2)
    return _made(transformers.YolosForObjectDetection, config)


def make_detr() -> transformers.DetrForObjectDetection:
    """Return a DETR with 6 queries on a ResNet of transformers."""
    return _made(transformers.DetrForObjectDetection, transformers.DetrConfig(**_DETR, backbone_config=_resnet()))


def make_timm_detr() -> transformers.DetrForObjectDetection:
    """Return a DETR on a ResNet-18 of timm, without its weights."""
    backbone = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=[1, 2, 3, 4])
    return _made(transformers.DetrForObjectDetection, transformers.DetrConfig(**_DETR, backbone_config=backbone))


def make_rt_detr() -> transformers.RTDetrForObjectDetection:
    """Return an RT-DETR with 6 queries."""
    config = transformers.RTDetrConfig(**_RT_DETR, decoder_n_points=2, backbone_config=_stages())
    return _made(transformers.RTDetrForObjectDetection, config)


def _conditional_detr() -> PreTrainedModel:
    config = transformers.ConditionalDetrConfig(**_DETR, backbone_config=_resnet())
    return _made(transformers.ConditionalDetrForObjectDetection, config)


def _deformable_detr() -> PreTrainedModel:
    """Return a Deformable DETR whose queries are selected among the positions of the encoder."""
    two_stages = {"two_stage": True, "two_stage_num_proposals": 6, "with_box_refine": True, "num_feature_levels": 2}
    backbone = _resnet("stage1", "stage2")
    config = transformers.DeformableDetrConfig(**_DETR, **two_stages, backbone_config=backbone)
    return _made(transformers.DeformableDetrForObjectDetection, config)


def _dab_detr() -> PreTrainedModel:
    sizes = {**{name: value for name, value in _DETR.items() if name != "d_model"}, "hidden_size": 32}
    config = transformers.DabDetrConfig(**sizes, backbone_config=_resnet())
    return _made(transformers.DabDetrForObjectDetection, config)


def _rt_detr_v2() -> PreTrainedModel:
    config = transformers.RTDetrV2Config(**_RT_DETR, decoder_n_points=2, backbone_config=_stages())
    return _made(transformers.RTDetrV2ForObjectDetection, config)


def _d_fine() -> PreTrainedModel:
    layers = {"stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2]}
    widths = {"stage_in_channels": [8, 8, *_CHANNELS[:2]], "stage_out_channels": [8, *_CHANNELS]}
    backbone = transformers.HGNetV2Config(
        **layers,
        **widths,
        hidden_sizes=[8, *_CHANNELS],
        stem_channels=[3, 8, 8],
        stage_mid_channels=[8] * 4,
        out_features=_THREE,
    )
    config = transformers.DFineConfig(**_RT_DETR, decoder_n_points=[2, 2, 2], backbone_config=backbone)
    return _made(transformers.DFineForObjectDetection, config)


def _lw_detr() -> PreTrainedModel:
    backbone = transformers.LwDetrViTConfig(**_TOWER, pretrain_image_size=64, window_block_indices=[0], num_windows=4)
    config = transformers.LwDetrConfig(**_LATE, projector_scale_factors=[1.0], backbone_config=backbone)
    return _made(transformers.LwDetrForObjectDetection, config)


def _rf_detr() -> PreTrainedModel:
    backbone = transformers.RfDetrDinov2Config(**_TOWER, num_windows=2)
    return _made(transformers.RfDetrForObjectDetection, transformers.RfDetrConfig(**_LATE, backbone_config=backbone))


def _resnet(*stages: str) -> transformers.ResNetConfig:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetConfig(**sizes, out_features=[*stages] or ["stage2"])


def _stages() -> transformers.RTDetrResNetConfig:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, *_CHANNELS], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return transformers.RTDetrResNetConfig(**sizes, out_features=_THREE)


def _made(kind: Any, config: Any) -> Any:
    """Return a network whose objects differ between images and queries: with larger weights, and likely classes."""
    torch.manual_seed(0)
    network = kind(config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1 and "backbone" not in name:
                weight.mul_(4)
            if weight.ndim == 1 and weight.min() < -3:
                weight.zero_()  # of logits that start at a small probability
    return network.eval()


OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "Conditional DETR": _conditional_detr,
    "DAB-DETR": _dab_detr,
    "Deformable DETR": _deformable_detr,
    "RT-DETRv2": _rt_detr_v2,
    "D-FINE": _d_fine,
    "LW-DETR": _lw_detr,
    "RF-DETR": _rf_detr,
}
