"""The command line prunes, measures and finetunes a network of semantic segmentation without labels."""

import csv
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from helpers.command_line import isoprune, succeed
from helpers.segmenters import make_segformer
from helpers.stage_commands import write_four_classes
from transformers import AutoModelForSemanticSegmentation

CUT = ["--target-macs", "60%", "--prune.round_to", "1", "--prune.criterion", "gate_fisher"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a network, images, and the pruned network."""
    place = tmp_path_factory.mktemp("segmentation")
    make_segformer().save_pretrained(place / "segformer")
    transformers.SegformerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / "segformer")
    write_four_classes(place / "images")
    printed = succeed("prune", place / "segformer", *CUT, "--data", place / "images", "--output", place / "pruned")
    assert 'segment = pipeline("image-segmentation"' in printed and "pixels as base %" in printed
    return place


def test_figures_are_those_of_both_networks(place: Path) -> None:
    metrics = json.loads((place / "pruned" / "metrics.json").read_text())
    assert set(metrics["base"]) == {"images", "data", "split"}
    dense, cut = (
        AutoModelForSemanticSegmentation.from_pretrained(place / name).eval() for name in ("segformer", "pruned")
    )
    processor = transformers.AutoImageProcessor.from_pretrained(place / "pruned")
    files = sorted((place / "images" / "val").rglob("*.png"))
    images = [transformers.image_utils.load_image(str(file)) for file in files]
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted, found = dense(pixels).logits.double(), cut(pixels).logits.double()
    same = (wanted.argmax(1) == found.argmax(1)).double().mean()
    shares = wanted.softmax(1)
    divergence = (shares * (shares.log() - found.log_softmax(1))).sum(1).mean()
    assert metrics["pruned"]["same_class"] == pytest.approx(float(same), abs=1e-6)
    assert metrics["pruned"]["pixel_divergence"] == pytest.approx(float(divergence), abs=1e-6)
    assert metrics["pruned"]["images"] == 4 and metrics["pruned"]["same_class"] > 0.8


def test_evaluation_repeats_and_doctor_agrees(place: Path) -> None:
    before = json.loads((place / "pruned" / "metrics.json").read_text())["pruned"]
    succeed("evaluate", place / "pruned", "--data", place / "images")
    assert json.loads((place / "pruned" / "metrics.json").read_text())["pruned"] == before
    printed = succeed("doctor", place / "pruned")
    assert "FAIL" not in printed and "save-load" in printed


@pytest.mark.families
def test_finetuning_needs_no_labels(place: Path, tmp_path: Path) -> None:
    words = ["--data", place / "images", "--finetune.epochs", "2", "--finetune.learning_rate", "1e-3"]
    succeed("finetune", place / "pruned", *words, "--finetune.batch_size", "8", "--output", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["finetuned"]["same_class"] > 0.8
    opened = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert opened(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3, 8, 8)


@pytest.mark.faults
def test_maps_are_exported_and_compared_at_sizes(place: Path, tmp_path: Path) -> None:
    data = ["--data", place / "images"]
    succeed("export", place / "pruned", *data, "--output", tmp_path / "onnx")
    record, metrics = (json.loads((tmp_path / "onnx" / f"{name}.json").read_text()) for name in ("export", "metrics"))
    assert record["outputs"] == ["logits"] and record["same_class"] is None
    assert metrics["pruned+fp32"]["same_class"] == 1.0
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = AutoModelForSemanticSegmentation.from_pretrained(place / "pruned").eval()(pixels).logits.numpy()
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (found,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    settings = ["--prune.round_to", "1", "--prune.criterion", "l1", "--sizes", "80%,60%"]
    succeed("frontier", place / "segformer", *settings, *data, "--output", tmp_path / "sizes")
    _, large, small = csv.DictReader((tmp_path / "sizes" / "frontier.csv").read_text().splitlines())
    assert 1 > float(large["same_class"]) > float(small["same_class"]) > 0.4


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "pruned", "--data", "images", "--per_class", "classes.csv"],
        ["prune", "segformer", "--data", "images", "--prune.num_labels", "4"],
        ["prune", "segformer", "--data", "images", "--prune.layout", "uniform"],
    ],
    ids=["per_class", "num_labels", "uniform"],
)
def test_settings_of_classifiers_are_refused(words: list[str], place: Path, tmp_path: Path) -> None:
    output = ["--output", tmp_path / "out"] if words[0] == "prune" else []
    done = isoprune(*(place / word if word in ("segformer", "pruned", "images") else word for word in words), *output)
    line = done.err.strip().splitlines()[-1]
    assert done.code == 2 and line.startswith("isoprune: error: ") and "semantic-segmentation" in line
