"""Train the CIFAR-10 nets of `real_accuracy.py` from scratch, with the stage `finetune` of the command line.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/cifar_nets.py NAME --data DIR --output FOLDER [FLAGS]

timm has no builders of nets for 32 x 32 pixels, so this module registers them: `timm/cifar_NAME` exists once it is
imported. The net gets random weights in FOLDER/base and is trained into FOLDER/dense. The same command resumes a
training that was stopped. FLAGS are those of `isoprune finetune`, and override the settings of `TRAINING`. For
`real_accuracy.py`, copy FOLDER/dense/model.safetensors to benchmarks/weights/NAME.safetensors.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from timm.models import register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from isoprune_hf import load_base
from isoprune_hf.__main__ import main as isoprune

SIDE = 32
STATISTICS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}  # of the training images
COMMON = {
    "epochs": 200,
    "batch_size": 128,
    "warmup_epochs": 5,
    "label_smoothing": 0.0,
    "crop_scale": "[0.8, 1.0]",
    "precision": "bf16",
    "channels_last": "true",
    "evaluate_every": 5,
}
CNN = {**COMMON, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4}
TRAINING: dict[str, dict[str, Any]] = {
    "resnet20": CNN,
    "resnet56": CNN,
    "vgg16_bn": {**CNN, "learning_rate": 0.05},
    "mobilenetv2": CNN,
    "vit": {**COMMON, "learning_rate": 1e-3, "auto_augment": "rand-m9-mstd0.5-inc1"},
}
VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def _resnet(blocks: int, num_classes: int) -> nn.Module:
    """Build a CIFAR ResNet with `blocks` basic blocks in each of three stages of 16, 32 and 64 channels.

    Source:
        He et al., Deep residual learning for image recognition, 2016, section 4.2, with projections as shortcuts.
    """
    layers = (blocks, blocks, blocks)
    # Only the deep stem lets its width be chosen; half of it is 8.
    model = ResNet(BasicBlock, layers, num_classes, channels=(16, 32, 64), stem_type="deep", stem_width=8)
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model.maxpool = model.layer4 = nn.Identity()
    return _described(model)


@register_model
def cifar_resnet20(num_classes: int = 10, **_: Any) -> nn.Module:
    """Build the ResNet of 20 layers, 0.27 M parameters."""
    return _resnet(3, num_classes)


@register_model
def cifar_resnet56(num_classes: int = 10, **_: Any) -> nn.Module:
    """Build the ResNet of 56 layers, 0.86 M parameters."""
    return _resnet(9, num_classes)


@register_model
def cifar_vgg16_bn(num_classes: int = 10, **_: Any) -> nn.Module:
    """Build VGG-16 with BatchNorm and one linear layer, 14.7 M parameters."""
    model = VGG(VGG16, num_classes, norm_layer=nn.BatchNorm2d)
    model.pre_logits = nn.Identity()
    model.head.fc = nn.Linear(512, num_classes)
    return _described(model)


@register_model
def cifar_mobilenetv2(num_classes: int = 10, **_: Any) -> nn.Module:
    """Build MobileNetV2 with three strides less than for 224 pixels, 2.2 M parameters."""
    stages = [
        ["ds_r1_k3_s1_c16"],
        ["ir_r2_k3_s1_e6_c24"],
        ["ir_r3_k3_s2_e6_c32"],
        ["ir_r4_k3_s2_e6_c64"],
        ["ir_r3_k3_s1_e6_c96"],
        ["ir_r3_k3_s2_e6_c160"],
        ["ir_r1_k3_s1_e6_c320"],
    ]
    model = EfficientNet(
        decode_arch_def(stages),
        num_classes,
        round_chs_fn=round_channels,
        norm_layer=nn.BatchNorm2d,
        act_layer=nn.ReLU6,
    )
    model.conv_stem.stride = (1, 1)
    return _described(model)


@register_model
def cifar_vit(num_classes: int = 10, **_: Any) -> nn.Module:
    """Build a ViT of six blocks of width 192 with patches of 4 pixels, 2.7 M parameters."""
    return _described(
        VisionTransformer(SIDE, 4, num_classes=num_classes, embed_dim=192, depth=6, num_heads=3, drop_path_rate=0.1)
    )


def _described(model: nn.Module) -> nn.Module:
    model.pretrained_cfg = {
        "input_size": (3, SIDE, SIDE),
        "num_classes": model.num_classes,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        **STATISTICS,
    }
    return model


def train(name: str, data: Path, output: Path, flags: list[str], start: Path | None = None) -> int:
    """Train a net by the stage `finetune`; return its exit code.

    Args:
        name: Name in `TRAINING`.
        data: CIFAR-10 with the splits train and test.
        output: Folder of `base`, the net with random weights, and of `dense`, the trained one.
        flags: Further flags of the stage.
        start: Folder of a net to go on from, in place of random weights.
    """
    base = start or output / "base"
    if not (base / "config.json").is_file():
        model, processor = load_base(f"timm/cifar_{name}", pretrained=False)
        processor.save_pretrained(base)
        model.save_pretrained(base)
    settings = [word for key, value in TRAINING[name].items() for word in (f"--finetune.{key}", str(value))]
    words = ["finetune", str(base), "--data.dataset", str(data), "--data.num_workers", "0"]
    return isoprune([*words, "--finetune.teacher", "none", *settings, "--output", str(output / "dense"), *flags])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=TRAINING)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder of base and dense")
    parser.add_argument("--start", type=Path, help="trained folder to go on from; by default random weights")
    args, flags = parser.parse_known_args()
    return train(args.name, args.data, args.output, flags, args.start)


if __name__ == "__main__":
    sys.exit(main())
