"""A pruned model is finetuned on other classes with one flag."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import isoprune
from helpers.folders import logits, tensors
from PIL import Image
from transformers import AutoModelForImageClassification

from isoprune_hf.commands.steps.sources import open_with_new_head

NAMES = ("red", "green", "blue")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for channel, name in enumerate(NAMES):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


def test_finetune_replaces_head_for_other_classes(pruned, images: Path, tmp_path: Path) -> None:
    flags = ["--model", pruned("vit").folder, "--data.dataset", images, "--finetune.epochs", "1"]
    flags += ["--finetune.batch_size", "4", "--output", tmp_path / "out"]
    refused = isoprune("finetune", *map(str, flags))
    assert refused.code == 2 and "the data has 3 classes (blue, green, red), the model has 7" in refused.err
    assert isoprune("finetune", *map(str, flags), "--num_labels", "data").code == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert sorted(model.config.label2id) == sorted(NAMES) and model.model.head.out_features == 3
    assert isoprune("doctor", str(tmp_path / "out")).code == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["finetuned"]["images"] == 12


@pytest.mark.parametrize("labels", [NAMES, tuple("abcdefg")])
def test_only_the_head_is_drawn_anew(labels: tuple[str, ...], pruned) -> None:
    sample = pruned("vit")
    model = open_with_new_head(str(sample.folder), labels, seed=1).model
    old, new = tensors(sample.model), tensors(model)
    changed = {name for name in new if new[name].shape != old[name].shape or not torch.equal(new[name], old[name])}
    assert changed <= {"model.head.weight", "model.head.bias"} and "model.head.weight" in changed
    assert logits(model, sample.images).shape == (2, len(labels))
    width = sample.model.model.head.in_features
    saved = sample.model.config.cost["pruned"]["params"] - model.config.cost["pruned"]["params"]
    assert saved == (7 - len(labels)) * (width + 1)
