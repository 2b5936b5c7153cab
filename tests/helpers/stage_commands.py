"""Commands of the stages that write a result, on a tiny base and a few images."""

import json
from pathlib import Path

import numpy as np
from helpers.cut_folders import MODEL_ARGS, NAME
from PIL import Image

VIT = ["--prune.model", NAME, "--prune.pretrained", "false", "--prune.model_args", json.dumps(MODEL_ARGS)]
CUT = [*VIT, "--prune.num_labels", "4", "--prune.criterion", "l1", "--prune.round_to", "4"]
_TRAINING = {"epochs": 2, "batch_size": 8, "state_every": 1, "virtual_replicas": 1, "mixup": 0, "cutmix": 0}


def write_four_classes(root: Path) -> Path:
    """Write 16 images of four classes for training and four for evaluation; return their folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for label in range(4):
            (root / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{number}.png")
    return root


def training_flags(section: str) -> list[str]:
    """Return the flags of a short training with a state after each of its four updates."""
    return [part for name, value in _TRAINING.items() for part in (f"--{section}.{name}", str(value))]


def run_command(images: Path, *, pretrain: bool = False) -> list[str]:
    """Return the words of `run`, without its output."""
    command = ["run", *CUT, "--data.dataset", str(images), *training_flags("finetune")]
    return [*command, *training_flags("pretrain")] if pretrain else command
