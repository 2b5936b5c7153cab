"""The models of the population `anchor` of `coverage.py`, and what torch-pruning does with them.

timm: the smallest image classifier of every model file (except `test_*` models); see `find_timm`.
transformers: every type of its image-classification mapping, with a small config.
"""

from typing import Any

import timm
import torch

LABELS = 10
VIT = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
}
_DINO = {"image_size": 56, "patch_size": 14, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
_TOWERS = {"vision_config": VIT, "text_config": {"vocab_size": 64, "num_hidden_layers": 1}}
_SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_PYRAMID = {
    "image_size": 64,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [32, 64, 96, 128],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [4, 4, 4, 4],
}
_SHIELD = {
    "text_config": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    "vision_config": VIT,
    "mm_tokens_per_image": 4,
    "boi_token_index": 125,
    "eoi_token_index": 126,
    "image_token_index": 127,
    "yes_token_index": 5,
    "no_token_index": 6,
}
# Type of transformers -> its small config.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "beit": {**VIT, "use_relative_position_bias": True},
    "bit": {"embedding_size": 64, "hidden_sizes": [64, 128, 192, 256], "depths": [1, 1, 1, 1], "num_groups": 8},
    "clip": _TOWERS,
    "convnext": {"image_size": 64, "depths": [1, 1, 2, 1], "hidden_sizes": [32, 48, 64, 96]},
    "convnextv2": {"image_size": 64, "depths": [1, 1, 2, 1], "hidden_sizes": [32, 48, 64, 96]},
    "cvt": {"embed_dim": [32, 64, 96], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "data2vec-vision": {**VIT, "use_relative_position_bias": True, "out_indices": [0, 1, 1, 1]},
    "deit": VIT,
    "dinat": {},
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "donut-swin": _SWIN,
    "efficientnet": {"image_size": 64, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "focalnet": {
        "image_size": 64,
        "patch_size": 2,
        "embed_dim": 32,
        "hidden_sizes": [32, 64, 96],
        "depths": [1, 1, 2],
        "focal_levels": [2, 2, 2],
        "focal_windows": [3, 3, 3],
    },
    "hgnet_v2": {
        "embedding_size": 32,
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [64, 96, 128, 160],
        "stem_channels": [3, 16, 24],
        "stage_in_channels": [24, 64, 96, 128],
        "stage_mid_channels": [24, 32, 48, 64],
        "stage_out_channels": [64, 96, 128, 160],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
    },
    "hiera": {
        "image_size": [64, 64],
        "embed_dim": 32,
        "depths": [1, 2, 2],
        "num_heads": [1, 2, 4],
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, True, False],
    },
    "ijepa": VIT,
    "imagegpt": {"vocab_size": 65, "n_positions": 64, "n_embd": 96, "n_layer": 2, "n_head": 3},
    "levit": {"image_size": 64, "hidden_sizes": [64, 96, 128], "num_attention_heads": [2, 3, 4], "depths": [2, 2, 2]},
    "metaclip_2": _TOWERS,
    "mobilenet_v1": {"image_size": 64, "depth_multiplier": 0.5},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.5},
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [64, 80, 96],
        "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320],
        "num_attention_heads": 2,
    },
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.5},
    "perceiver": {
        "image_size": 16,
        "num_latents": 16,
        "d_latents": 128,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "poolformer": {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 96, 128]},
    "pp_lcnet": {},
    "pvt": _PYRAMID,
    "pvt_v2": _PYRAMID,
    "regnet": {
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 96, 128],
        "depths": [1, 1, 2, 1],
        "groups_width": 32,
    },
    "resnet": {"embedding_size": 32, "hidden_sizes": [64, 96, 128, 160], "depths": [1, 1, 2, 1]},
    "segformer": _PYRAMID,
    "shieldgemma2": _SHIELD,
    "siglip": _TOWERS,
    "siglip2": {**_TOWERS, "vision_config": {key: value for key, value in VIT.items() if key != "image_size"}},
    "swiftformer": {"image_size": 64, "depths": [1, 1, 2, 1], "embed_dims": [32, 48, 64, 96]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "timm_wrapper": {"architecture": "resnet18"},
    "textnet": {"image_size": [64, 64], "stem_out_channels": 32, "hidden_sizes": [32, 32, 48, 64, 96]},
    "vit": VIT,
    "vit_msn": VIT,
}
# Model file of timm -> its smallest classifier, found by `find_timm` in timm 1.0.31.
TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_336",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "lcnet_035",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
# Models of the anchor that are no classifiers of images here -> reason.
NOT_APPLICABLE = {
    "transformers/dinat": "needs the library natten",
    "transformers/imagegpt": "it reads tokens, a colour cluster for each pixel",
    "transformers/shieldgemma2": "it reads the tokens of a text with those of an image",
    "transformers/siglip2": "it reads patches and their sizes, which its processor makes, instead of images",
}
# Number of these models that torch-pruning 1.6.1 prunes, with all their blocks, and the root causes of its failures.
TORCH_PRUNING = {"timm": 45, "transformers": 22}
CAUSES = {
    "T": "the search does not end",
    "A": "numbers that modules keep",
    "Q": "queries, keys and values in other forms",
    "C": "concatenation",
    "S": "parts of a channel axis",
    "H": "the head axis mistaken for channels",
    "R": "expand and reshape of tokens",
    "O": "layers of an unknown type",
    "D": "outside the graph of the output",
    "G": "depthwise with a multiplier",
    "-": "none: torch-pruning prunes it",
}
# Families of timm (t) and types of transformers (hf) by cause; the others are pruned.
FAMILIES = {
    "T": "t:byoanet t:deepseek_vit t:efficientformer_v2 t:efficientvim t:efficientvit_msra t:focalnet t:hieradet_sam2 "
    "t:iformer t:maxxvit t:mobilenetv5 t:nest t:rexnet t:visformer hf:focalnet hf:mobilevitv2 hf:shieldgemma2",
    "A": "t:cpubone t:crossvit t:davit t:lowformer t:pvt_v2 t:tresnet t:volo hf:pvt hf:pvt_v2 hf:segformer",
    "Q": "t:cait t:edgenext t:efficientformer t:levit t:nextvit t:qwen3_vit t:tiny_vit t:xcit hf:levit",
    "C": "t:coat t:cspnet t:gemma4_vit t:tnt hf:cvt hf:dinov2 hf:dinov2_with_registers hf:donut-swin hf:imagegpt",
    "S": "t:dpn t:efficientvit_mit t:eva t:fasternet t:mambaout t:mlp_mixer t:res2net t:sknet",
    "H": "t:convit t:swin_transformer_v2 t:swin_transformer_v2_cr t:vision_transformer_relpos hf:swinv2",
    "R": "t:gcvit t:hiera t:shvit t:twins hf:hiera",
    "O": "t:metaformer t:nfnet t:sequencer hf:perceiver",
    "D": "hf:clip hf:metaclip_2 hf:siglip hf:siglip2",
    "G": "t:fastvit t:pit",
}


def find_timm() -> dict[str, str]:
    """Find the smallest classifier of every model file of timm, by building all models on meta; takes some minutes.

    A model without a classifier is used only if its file has no other.
    """
    smallest = {}
    for family in timm.list_modules():
        sizes = []
        for name in timm.list_models(module=family):
            if not name.startswith("test_"):
                with torch.device("meta"):
                    network = timm.create_model(name, num_classes=LABELS)
                is_headless = not network.pretrained_cfg.get("num_classes")
                if network.num_classes == LABELS:  # otherwise it returns features
                    sizes.append((is_headless, sum(parameter.numel() for parameter in network.parameters()), name))
        if sizes:
            smallest[family] = min(sizes)[2]
    return smallest
