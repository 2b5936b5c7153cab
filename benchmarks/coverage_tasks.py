"""The models of the population `tasks` of `coverage.py`: small networks of the tasks without labels.

Of transformers every class that opens for one of these tasks and takes images alone, with a small config; of timm the
encoders of some model files, without their heads.
"""

from typing import Any

from coverage_anchor import TRANSFORMERS
from coverage_anchor import VIT as _VIT

SIDE = 64  # pixels of the images
SIDES = {"Sam2HieraDetModel": 128, "Sam2VisionModel": 128}  # class -> another side of its images
Network = tuple[str, dict[str, Any]]  # type of transformers, values of its config

_STAGES = [f"stage{number}" for number in range(1, 5)]
_LABELS = {"num_labels": 4}
_WIDTHS = [32, 48, 64, 96]
_BIT = {"model_type": "bit", **TRANSFORMERS["bit"], "layer_type": "bottleneck", "out_features": _STAGES[:3]}
_CONVNEXT = {"model_type": "convnext", "hidden_sizes": _WIDTHS, "depths": [1, 1, 1, 1], "out_features": _STAGES}
_DINOV3 = {"image_size": SIDE, "hidden_sizes": _WIDTHS, "depths": [1, 1, 1, 1]}
_DINOV2 = {"model_type": "dinov2", **_VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_DINOV2 |= {"apply_layernorm": True, "reshape_hidden_states": False}
_TOWER = {**_VIT, "num_hidden_layers": 4}
_UPERNET = {"backbone_config": _CONVNEXT, "hidden_size": 64, "auxiliary_channels": 32, "pool_scales": [1, 2]}
_NECK = {"neck_hidden_sizes": [32, 32, 64, 64], "fusion_hidden_size": 32}
_ANYTHING = {"backbone_config": _DINOV2, "reassemble_hidden_size": 96, "patch_size": 16, "head_hidden_size": 32}
_ANYTHING |= _NECK
_DPT = {**_TOWER, **_NECK, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False}
_BEIT = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "out_indices": [0, 1, 2, 3]}
_ZOE = {"backbone_config": {**_TOWER, **_BEIT, "model_type": "beit", "out_indices": [1, 2, 3, 4]}, **_NECK}
_ZOE["backbone_config"] |= {"reshape_hidden_states": False}
_ZOE |= {"bottleneck_features": 32, "bin_embedding_dim": 32, "num_attractors": [4, 2, 2, 1]}
_ZOE |= {"bin_configurations": [{"n_bins": 16, "min_depth": 0.001, "max_depth": 10.0, "name": "room"}]}
_TIPS = {**_TOWER, "model_type": "tipsv2_vision_model", "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
_TIPS_DPT = {**_NECK, "backbone_config": _TIPS}
_CHM = {"backbone_config": {**_TOWER, "model_type": "dinov3_vit", "out_indices": [1, 2, 3, 4]}, **_NECK}
_CHM["backbone_config"] |= {"return_class_token": True, "reshape_hidden_states": True, "apply_layernorm": True}
_CHM |= {"post_process_channels": [32, 32, 64, 64], "head_hidden_size": 32, "number_output_channels": 64}
_PYRAMID = {**TRANSFORMERS["segformer"], "decoder_hidden_size": 64}
_SAPIENS = {**_TOWER, "num_first_full_attention_layers": 1, "num_last_full_attention_layers": 1}
_SAPIENS |= {"num_key_value_attention_heads": 3}

_SAPIENS_HEAD = {"upsample_out_channels": [48, 32], "upsample_kernel_sizes": [4, 4], "conv_out_channels": [32]}
_SAPIENS_HEAD |= {"conv_kernel_sizes": [1]}

_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_QUERIES = {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 12, **_LABELS, **_HEADS}
_RESNET = {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]}
_RESNET |= {"layer_type": "basic", "out_features": ["stage2"]}
_DETR = {**_QUERIES, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0, "backbone_config": _RESNET}
_DEFORMABLE = {**_DETR, "d_model": 64, "backbone_config": {**_RESNET, "out_features": ["stage1", "stage2"]}}
_DEFORMABLE |= {"two_stage": True, "two_stage_num_proposals": 12, "with_box_refine": True, "num_feature_levels": 2}
_RT_RESNET = {"model_type": "rt_detr_resnet", "embedding_size": 32, "hidden_sizes": _WIDTHS, "depths": [1, 1, 1, 1]}
_RT_RESNET |= {"layer_type": "basic", "out_features": _STAGES[1:]}
_HGNET = {"model_type": "hgnet_v2", "hidden_sizes": _WIDTHS, "stem_channels": [3, 16, 16], "depths": [1, 1, 1, 1]}
_HGNET |= {"stage_in_channels": [16, 32, 48, 64], "stage_mid_channels": [16] * 4, "stage_out_channels": _WIDTHS}
_HGNET |= {"stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2], "out_features": _STAGES[1:]}
_RT = {"d_model": 64, "encoder_hidden_dim": 64, "encoder_in_channels": _WIDTHS[1:], "decoder_layers": 2}
_RT |= {**_QUERIES, "decoder_in_channels": [64, 64, 64], "num_denoising": 0, "backbone_config": _RT_RESNET}
_FINE = {**_RT, "backbone_config": _HGNET, "decoder_n_points": [2, 2, 2]}
_LAYOUT = {**_RT, "x4_feat_dim": 32, "backbone_config": {**_HGNET, "out_features": _STAGES}}
_LATE = {"d_model": 64, "decoder_ffn_dim": 128, "decoder_layers": 2, "num_queries": 12, "group_detr": 2, **_LABELS}
_LATE |= {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
_LW_VIT = {"model_type": "lw_detr_vit", **_VIT, "pretrain_image_size": SIDE, "window_block_indices": [0]}
_LW_VIT |= {"num_windows": 4, "out_indices": [1, 2]}
_RF_VIT = {"model_type": "rf_detr_dinov2", **_VIT, "num_windows": 2, "out_indices": [1, 2]}

_TEXT = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_TEXT |= {"intermediate_size": 128, "max_position_embeddings": 64, "pad_token_id": 0}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
_TOWERS = {"vision_config": _VIT, "text_config": _TEXT, "projection_dim": 64}
_BY_SIZE = {"vision_config": _VIT, "text_config": {**_TEXT, "projection_size": 96}}
_EFFICIENT = {"image_size": SIDE, "width_coefficient": 0.5, "depth_coefficient": 0.2, "hidden_dim": 256}
_SWIN = {"image_size": SIDE, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_SAM2 = {"hidden_size": 32, "image_size": [128, 128], "blocks_per_stage": [1, 1, 2, 1], "num_attention_heads": 1}
_SAM2 |= {"embed_dim_per_stage": [32, 64, 96, 128], "num_attention_heads_per_stage": [1, 2, 3, 4]}
_SAM2 |= {"window_size_per_stage": [8, 4, 4, 4], "global_attention_blocks": [3]}
_SAM2 |= {"window_positional_embedding_background_size": [4, 4]}
_SAM2_NECK = {"backbone_config": {"model_type": "sam2_hiera_det_model", **_SAM2}, "fpn_hidden_size": 64}
_SAM2_NECK |= {"backbone_channel_list": [128, 96, 64, 32], "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}

_SAM3_NECK = {"backbone_config": {"model_type": "sam3_vit_model", **_VIT}, "fpn_hidden_size": 64}
_UVDOC = {"resnet_head": [[3, 32], [32, 32]], "stage_configs": [[[64, 1]], [[64, 2], [64, 3]]]}
_UVDOC |= {"resnet_configs": [[[32, 32, 1, False], [32, 32, 3, False]], [[32, 64, 1, True], [64, 64, 3, False]]]}
_UVDOC |= {"out_features": ["stage1", "stage2"]}
_UVDOC_HEAD = {
    "backbone_config": {"model_type": "uvdoc_backbone", **_UVDOC},
    "bridge_connector": [64, 64],
    "out_point_positions2D": [[64, 32], [32, 2]],
}

# Type of transformers -> the classes of its encoders, which have the config of the anchor.
_SHARED = {
    "beit": ("BeitModel", "BeitBackbone"),
    "bit": ("BitModel", "BitBackbone"),
    "convnext": ("ConvNextModel", "ConvNextBackbone"),
    "convnextv2": ("ConvNextV2Model", "ConvNextV2Backbone"),
    "cvt": ("CvtModel",),
    "data2vec-vision": ("Data2VecVisionModel",),
    "deit": ("DeiTModel",),
    "donut-swin": ("DonutSwinModel",),
    "efficientnet": ("EfficientNetModel",),
    "focalnet": ("FocalNetModel", "FocalNetBackbone"),
    "hgnet_v2": ("HGNetV2Backbone",),
    "hiera": ("HieraModel", "HieraBackbone"),
    "levit": ("LevitModel",),
    "mobilenet_v1": ("MobileNetV1Model",),
    "mobilenet_v2": ("MobileNetV2Model",),
    "mobilevit": ("MobileViTModel",),
    "mobilevitv2": ("MobileViTV2Model",),
    "poolformer": ("PoolFormerModel",),
    "pp_lcnet": ("PPLCNetBackbone",),
    "pvt": ("PvtModel",),
    "pvt_v2": ("PvtV2Model", "PvtV2Backbone"),
    "regnet": ("RegNetModel",),
    "resnet": ("ResNetModel", "ResNetBackbone"),
    "segformer": ("SegformerModel",),
    "swiftformer": ("SwiftFormerModel",),
    "swin": ("SwinModel", "SwinBackbone"),
    "swinv2": ("Swinv2Model", "Swinv2Backbone"),
    "textnet": ("TextNetModel", "TextNetBackbone"),
    "vit": ("ViTModel",),
    "vit_msn": ("ViTMSNModel",),
}
# Types of transformers whose config is that of a ViT -> the classes of their encoders.
_LIKE_VIT = {
    "aimv2_vision_model": ("Aimv2VisionModel",),
    "altclip_vision_model": ("AltCLIPVisionModel",),
    "blip_vision_model": ("BlipVisionModel",),
    "blip_2_vision_model": ("Blip2VisionModel",),
    "chinese_clip_vision_model": ("ChineseCLIPVisionModel",),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "clipseg_vision_model": ("CLIPSegVisionModel",),
    "dinov2": ("Dinov2Model", "Dinov2Backbone"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTBackbone"),
    "dpt": ("DPTModel",),
    "flava_image_model": ("FlavaImageModel",),
    "git_vision_model": ("GitVisionModel",),
    "groupvit_vision_model": ("GroupViTVisionModel",),
    "instructblip_vision_model": ("InstructBlipVisionModel",),
    "instructblipvideo_vision_model": ("InstructBlipVideoVisionModel",),
    "internvl_vision": ("InternVLVisionModel",),
    "janus_vision_model": ("JanusVisionModel",),
    "lw_detr_vit": ("LwDetrViTBackbone",),
    "metaclip_2_vision_model": ("MetaClip2VisionModel", "MetaClip2VisionModelWithProjection"),
    "mlcd_vision_model": ("MLCDVisionModel",),
    "owlv2_vision_model": ("Owlv2VisionModel",),
    "owlvit_vision_model": ("OwlViTVisionModel",),
    "phi4_multimodal_vision": ("Phi4MultimodalVisionModel",),
    "pixio": ("PixioModel", "PixioBackbone"),
    "qianfan_ocr_vision": ("QianfanOCRVisionModel",),
    "radio": ("RadioModel",),
    "rf_detr_dinov2": ("RfDetrDinov2Backbone",),
    "sam3_vit_model": ("Sam3ViTModel",),
    "sam_hq_vision_model": ("SamHQVisionModel",),
    "sam_vision_model": ("SamVisionModel",),
    "sapiens2": ("Sapiens2Model", "Sapiens2Backbone"),
    "siglip_vision_model": ("SiglipVisionModel",),
    "tipsv2_vision_model": ("Tipsv2VisionModel", "Tipsv2VisionBackbone"),
    "vitdet": ("VitDetModel", "VitDetBackbone"),
    "vitpose_backbone": ("VitPoseBackbone",),
    "yolos": ("YolosModel",),
}
# Values that a type needs besides those of a ViT.
_BESIDES: dict[str, dict[str, Any]] = {
    "groupvit_vision_model": {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
    "lw_detr_vit": _LW_VIT,
    "rf_detr_dinov2": _RF_VIT,
    "sapiens2": _SAPIENS,
    "yolos": {"image_size": [SIDE, SIDE], "num_detection_tokens": 8},
}
_OTHER_ENCODERS: dict[str, Network] = {
    "AlignVisionModel": ("align_vision_model", _EFFICIENT),
    "DINOv3ConvNextModel": ("dinov3_convnext", _DINOV3),
    "DINOv3ConvNextBackbone": ("dinov3_convnext", _DINOV3),
    "GLPNModel": ("glpn", _PYRAMID),
    "IJepaModel": ("ijepa", _VIT),
    "MaskFormerSwinModel": ("maskformer-swin", _SWIN),
    "MaskFormerSwinBackbone": ("maskformer-swin", _SWIN),
    "PPLCNetV3Backbone": ("pp_lcnet_v3", {"scale": 0.5}),
    "PPLCNetV4Backbone": ("pp_lcnet_v4", {"scale": 0.5}),
    "RTDetrResNetBackbone": ("rt_detr_resnet", _RT_RESNET),
    "Sam2HieraDetModel": ("sam2_hiera_det_model", _SAM2),
    "Sam2VisionModel": ("sam2_vision_model", _SAM2_NECK),
    "Sam3VisionModel": ("sam3_vision_model", _SAM3_NECK),
    "Swin2SRModel": ("swin2sr", {**_SWIN, "patch_size": 1, "window_size": 8}),
    "UVDocBackbone": ("uvdoc_backbone", _UVDOC),
    "UVDocModel": ("uvdoc", _UVDOC_HEAD),
}


def _encoders() -> dict[str, Network]:
    shared = {name: (kind, TRANSFORMERS[kind]) for kind, names in _SHARED.items() for name in names}
    towers = {name: (kind, {**_VIT, **_BESIDES.get(kind, {})}) for kind, names in _LIKE_VIT.items() for name in names}
    return shared | towers | _OTHER_ENCODERS


# Task -> class of transformers -> its type and config.
NETWORKS: dict[str, dict[str, Network]] = {
    "image-feature-extraction": _encoders(),
    "semantic-segmentation": {
        "BeitForSemanticSegmentation": ("beit", {**_TOWER, **_BEIT, **_LABELS}),
        "Data2VecVisionForSemanticSegmentation": ("data2vec-vision", {**_TOWER, **_BEIT, **_LABELS}),
        "DPTForSemanticSegmentation": ("dpt", {**_DPT, **_LABELS}),
        "MobileNetV2ForSemanticSegmentation": ("mobilenet_v2", {**TRANSFORMERS["mobilenet_v2"], **_LABELS}),
        "MobileViTForSemanticSegmentation": ("mobilevit", {**TRANSFORMERS["mobilevit"], **_LABELS}),
        "MobileViTV2ForSemanticSegmentation": ("mobilevitv2", {**TRANSFORMERS["mobilevitv2"], **_LABELS}),
        "Sapiens2ForSemanticSegmentation": ("sapiens2", {**_SAPIENS, "head_config": _SAPIENS_HEAD, **_LABELS}),
        "SegformerForSemanticSegmentation": ("segformer", {**_PYRAMID, **_LABELS}),
        "Tipsv2DptForSemanticSegmentation": ("tipsv2_dpt", {**_TIPS_DPT, **_LABELS}),
        "UperNetForSemanticSegmentation": ("upernet", {**_UPERNET, **_LABELS}),
    },
    "depth-estimation": {
        "CHMv2ForDepthEstimation": ("chmv2", _CHM),
        "DepthAnythingForDepthEstimation": ("depth_anything", _ANYTHING),
        "DPTForDepthEstimation": ("dpt", _DPT),
        "GLPNForDepthEstimation": ("glpn", _PYRAMID),
        "PromptDepthAnythingForDepthEstimation": ("prompt_depth_anything", _ANYTHING),
        "Tipsv2DptForDepthEstimation": ("tipsv2_dpt", {**_TIPS_DPT, "num_depth_bins": 32}),
        "ZoeDepthForDepthEstimation": ("zoedepth", _ZOE),
    },
    "object-detection": {
        "ConditionalDetrForObjectDetection": ("conditional_detr", {**_DETR, "d_model": 64}),
        "DabDetrForObjectDetection": ("dab-detr", {**_DETR, "hidden_size": 64}),
        "DeformableDetrForObjectDetection": ("deformable_detr", _DEFORMABLE),
        "Deimv2ForObjectDetection": ("deimv2", {**_FINE, "anchor_image_size": None}),
        "DetrForObjectDetection": ("detr", {**_DETR, "d_model": 64}),
        "DFineForObjectDetection": ("d_fine", _FINE),
        "LwDetrForObjectDetection": (
            "lw_detr",
            {**_LATE, "projector_scale_factors": [1.0], "backbone_config": _LW_VIT},
        ),
        "PPDocLayoutV3ForObjectDetection": ("pp_doclayout_v3", _LAYOUT),
        "RfDetrForObjectDetection": ("rf_detr", {**_LATE, "backbone_config": _RF_VIT}),
        "RTDetrForObjectDetection": ("rt_detr", {**_RT, "decoder_n_points": 2}),
        "RTDetrV2ForObjectDetection": ("rt_detr_v2", {**_RT, "decoder_n_points": 2}),
        "TableTransformerForObjectDetection": ("table-transformer", {**_DETR, "d_model": 64}),
        "YolosForObjectDetection": ("yolos", {**_VIT, **_BESIDES["yolos"], **_LABELS}),
    },
    "zero-shot-image-classification": {
        "AlignModel": ("align", {"vision_config": _EFFICIENT, "text_config": _TEXT, "projection_dim": 64}),
        "AltCLIPModel": ("altclip", {**_TOWERS, "text_config": {**_TEXT, "project_dim": 64}}),
        "BlipModel": ("blip", _TOWERS),
        "ChineseCLIPModel": ("chinese_clip", _TOWERS),
        "CLIPModel": ("clip", _TOWERS),
        "CLIPSegModel": ("clipseg", _TOWERS),
        "MetaClip2Model": ("metaclip_2", _TOWERS),
        "SiglipModel": ("siglip", _BY_SIZE),
        "Tipsv2Model": ("tipsv2", {"vision_config": _VIT, "text_config": {**_TEXT, "hidden_size": 96}}),
    },
}
# Architectures of timm without a head, one for each kind of them up to 100 M parameters; see `coverage_reduce.py`.
ENCODERS_OF_TIMM = (
    "timm/davit_base_fl",
    "timm/eva02_tiny_patch14_224",
    "timm/naflexvit_base_patch16_siglip",
    "timm/resnet50_clip_gap",
    "timm/sam2_hiera_tiny",
    "timm/samvit_base_patch16",
    "timm/vit_base_patch16_radio_v3",
    "timm/vit_base_patch16_siglip_224",
    "timm/vit_base_patch16_siglip_gap_224",
    "timm/vit_pe_spatial_tiny_patch16_512",
    "timm/vit_small_patch14_dinov2",
    "timm/vit_small_patch14_reg4_dinov2",
    "timm/vit_small_patch16_dinov3",
    "timm/vit_tiny_patch16_dinov3_qkvb",
)
