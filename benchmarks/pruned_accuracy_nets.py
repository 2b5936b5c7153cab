"""Build and train the dense nets of `pruned_accuracy.py`: small architectures of timm and transformers.

timm has no builder of ResNet and MobileNet for 16x16 images, so this module registers two: `glyph_resnet` (3x3 stem
without stride and pool) and `glyph_mobilenet` (stem without stride, three resolutions). Their folders can be opened
only after this module was imported.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pruned_accuracy_data import ALPHABETS, SIDES, draw, stream_seed, test_split
from timm.models import register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torch.utils.data import DataLoader, Dataset

from isoprune_hf.checkpoint.folder import write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.pruning.cost.macs import count_cost

WEIGHT_DECAY = 0.05
SIDE = SIDES["glyphs"]


class Net(NamedTuple):
    """A dense net and its training.

    Args:
        base: As in `IsoPruneConfig`.
        rate: Maximum learning rate of the one-cycle schedule.
        steps: Training steps, each with `batch` new images.
        finetuning: Learning rates to choose from after pruning.
        data: Name of the images in `SIDES`.
        batch: Images in a training step.
        calibration: Images for scoring and repair.
        epoch: Images in an epoch of finetuning.
    """

    base: dict[str, Any]
    rate: float
    steps: int = 3000
    finetuning: tuple[float, float] = (5e-4, 1e-4)
    data: str = "glyphs"
    batch: int = 64
    calibration: int = 512
    epoch: int = 1500


def _timm(architecture: str, **args: Any) -> dict[str, Any]:
    return {"library": "timm", "architecture": architecture, "args": {"in_chans": 1, **args}}


def _vit(**args: int) -> dict[str, Any]:
    return _timm("vit_tiny_patch16_224", img_size=SIDE, patch_size=4, num_heads=4, **args)


CNN: dict[str, Any] = {"rate": 3e-3, "steps": 1000, "finetuning": (1e-3, 2e-4)}
NETS = {
    "vit": Net(_vit(embed_dim=96, depth=6), 2e-3),
    "resnet": Net(_timm("glyph_resnet"), **CNN),
    "convnext": Net(
        _timm("convnext_atto", patch_size=1, depths=[1, 2, 4, 1], dims=[24, 32, 64, 96], conv_mlp=False),
        **CNN,
    ),
    "hf_vit": Net(
        {
            "library": "transformers",
            "config": {
                "model_type": "vit",
                "image_size": SIDE,
                "patch_size": 4,
                "num_channels": 1,
                "hidden_size": 96,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "intermediate_size": 384,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        },
        2e-3,
    ),
    "mobilenet": Net(_timm("glyph_mobilenet"), **CNN),
    "swin": Net(
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=SIDE,
            patch_size=2,
            window_size=4,
            embed_dim=48,
            depths=[2, 4],
            num_heads=[2, 4],
        ),
        2e-3,
        steps=2000,
    ),
    "vit_deep": Net(_vit(embed_dim=64, depth=12), 2e-3),
    "deit_tiny": Net(
        _timm("deit_tiny_patch16_224", img_size=SIDES["letters"], patch_size=8),
        1e-3,
        steps=2500,
        data="letters",
        batch=256,
        calibration=2048,
        epoch=6000,
    ),
    "vit_digits": Net(_vit(embed_dim=96, depth=6), 2e-3, steps=1500, data="digits"),
}


@register_model
def glyph_resnet(num_classes: int = 1000, in_chans: int = 3, **_: Any) -> ResNet:
    """Build a bottleneck ResNet: two blocks each of width 16, 24, 32, 48 (times 4), at 16, 8, 4 and 2 pixels."""
    model = ResNet(
        Bottleneck,
        layers=(2, 2, 2, 2),
        channels=(16, 24, 32, 48),
        num_classes=num_classes,
        in_chans=in_chans,
    )
    model.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return _described(model)


@register_model
def glyph_mobilenet(num_classes: int = 1000, in_chans: int = 3, **_: Any) -> EfficientNet:
    """Build a MobileNetV2 with nine inverted residuals, at 16, 8 and 4 pixels."""
    stages = [["ds_r1_k3_s1_c16"], ["ir_r2_k3_s2_e4_c24"], ["ir_r3_k3_s2_e4_c40"], ["ir_r3_k3_s1_e4_c64"]]
    model = EfficientNet(
        decode_arch_def(stages),
        num_features=192,
        stem_size=16,
        round_chs_fn=round_channels,
        norm_layer=nn.BatchNorm2d,
        act_layer=nn.ReLU6,
        num_classes=num_classes,
        in_chans=in_chans,
    )
    model.conv_stem.stride = (1, 1)
    return _described(model)


def _described(model: nn.Module) -> nn.Module:
    model.pretrained_cfg = {"input_size": (1, SIDE, SIDE), "num_classes": model.num_classes}
    return model


def build(name: str, seed: int = 0) -> IsoPruneForImageClassification:
    """Build a net with random weights."""
    net = NETS[name]
    labels = len(ALPHABETS.get(net.data, range(10)))
    torch.manual_seed(seed)
    config = IsoPruneConfig(base=net.base, num_labels=labels, image_size=[1, SIDES[net.data], SIDES[net.data]])
    return IsoPruneForImageClassification(config)


def train(
    model: IsoPruneForImageClassification,
    rate: float,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    report_every: int | None = None,
) -> None:
    """Train in place with AdamW, a one-cycle schedule and cross-entropy; leave the model in eval mode.

    Args:
        model: The model.
        rate: Maximum learning rate.
        batches: Images (B, 1, side, side) and labels (B,); they are moved to the device of the model.
        steps: Number of batches.
        report_every: Number of steps between two printed losses; without it none is printed.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=rate, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    model.train()
    for step, (images, labels) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = model(images.to(model.device), labels.to(model.device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report_every is not None and step % report_every == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: IsoPruneForImageClassification, data: str, split: str) -> float:
    """Return the top-1 accuracy on a split in percent; the model must be in eval mode."""
    images, labels = (part.to(model.device) for part in test_split(data, split))
    hits = [(model(x).logits.argmax(1) == y).sum() for x, y in zip(images.split(250), labels.split(250), strict=True)]
    return 100 * float(sum(hits)) / len(labels)


class Steps(Dataset):
    """Data set of the batches of a training, each drawn when it is read."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def __len__(self) -> int:
        return self.net.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draw(self.net.data, self.net.batch, stream_seed("train", step))


def train_dense(names: list[str], workdir: Path, device: str = "cpu", workers: int = 0) -> None:
    """Train the nets that are missing in `workdir`; each becomes a folder with its accuracy in `dense.json`.

    Args:
        names: Names in `NETS`.
        workdir: Parent folder of the nets.
        device: Device of the training.
        workers: Number of processes that draw images.
    """
    for name in names:
        folder, net = workdir / name, NETS[name]
        if (folder / "dense.json").is_file():
            print(f"{name}: already trained", flush=True)
            continue
        start, model = time.perf_counter(), build(name).to(device)
        batches = DataLoader(Steps(net), batch_size=None, num_workers=workers)
        train(model, net.rate, batches, net.steps, report_every=100)
        found = {split: accuracy(model, net.data, split) for split in ("selection", "report")}
        found |= {"macs": count_cost(model).macs, "seconds": round(time.perf_counter() - start, 1)}
        model.cpu().save_pretrained(folder)
        write_file(folder / "dense.json", json.dumps(found, indent=2, sort_keys=True) + "\n")
        print(f"{name}: {found}", flush=True)


def read_dense(name: str, workdir: Path) -> dict[str, float]:
    """Read the record of a trained net.

    Raises:
        SystemExit: The net was not trained.
    """
    record = workdir / name / "dense.json"
    if not record.is_file():
        raise SystemExit(f"{name} is not in {workdir}: run `pruned_accuracy.py train --nets {name}` first")
    return json.loads(record.read_text())


def load_dense(name: str, workdir: Path, device: str = "cpu") -> IsoPruneForImageClassification:
    """Open a trained net.

    Raises:
        SystemExit: The net was not trained.
    """
    read_dense(name, workdir)
    return IsoPruneForImageClassification.from_pretrained(workdir / name).eval().to(device)
