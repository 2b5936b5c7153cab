"""The command line prunes the tower of images of a CLIP by images alone, and its folder keeps the tokenizer."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.clip_networks import make_clip, save_published
from helpers.command_line import succeed
from helpers.stage_commands import write_four_classes
from PIL import Image
from transformers import AutoModelForZeroShotImageClassification, AutoTokenizer, pipeline

SCORED = ["--prune.round_to", "1", "--prune.criterion", "gate_fisher"]
CUT = ["--target-macs", "60%", *SCORED]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a CLIP as it is published, images, and the pruned CLIP."""
    place = tmp_path_factory.mktemp("zero_shot")
    save_published(make_clip(), place / "base")
    write_four_classes(place / "images")
    printed = succeed("prune", place / "base", *CUT, "--data", place / "images", "--output", place / "pruned")
    assert 'match = pipeline("zero-shot-image-classification"' in printed and "cosine" in printed
    return place


def test_figures_are_those_of_the_embeddings(place: Path) -> None:
    figures = json.loads((place / "pruned" / "metrics.json").read_text())["pruned"]
    dense, cut = (
        AutoModelForZeroShotImageClassification.from_pretrained(place / name).eval() for name in ("base", "pruned")
    )
    processor = transformers.AutoImageProcessor.from_pretrained(place / "pruned")
    images = [Image.open(file) for file in sorted((place / "images" / "val").rglob("*.png"))]
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted, found = (model.get_image_features(pixels).pooler_output.double() for model in (dense, cut))
    cosine = torch.nn.functional.cosine_similarity(wanted, found).mean()
    assert figures["cosine"] == pytest.approx(float(cosine), abs=1e-6) and "position_cosine" not in figures
    before = (place / "pruned" / "metrics.json").read_text()
    succeed("evaluate", place / "pruned", "--data", place / "images")
    assert (place / "pruned" / "metrics.json").read_text() == before


def test_folder_has_the_tokenizer_of_the_base(place: Path) -> None:
    texts = ["a photo of an animal", "red"]
    first, second = (AutoTokenizer.from_pretrained(place / name)(texts) for name in ("base", "pruned"))
    assert first["input_ids"] == second["input_ids"]
    match = pipeline("zero-shot-image-classification", model=str(place / "pruned"))
    answers = match(Image.new("RGB", (20, 24), "red"), candidate_labels=["animal", "object"])
    assert {answer["label"] for answer in answers} == {"animal", "object"}
    card = (place / "pruned" / "README.md").read_text()
    assert "AutoModelForZeroShotImageClassification" in card and 'candidate_labels=["' in card
    assert "FAIL" not in succeed("doctor", place / "pruned")


@pytest.mark.families
def test_run_tries_the_pipeline_of_texts(place: Path, tmp_path: Path) -> None:
    out, trained = tmp_path / "out", ["--finetune.epochs", "1", "--finetune.batch_size", "8"]
    printed = succeed("run", place / "base", *CUT, "--data", place / "images", "--output", out, *trained)
    assert "pipeline on a held-out image: " in printed and "animal 0." in printed
    metrics = json.loads((out / "model" / "metrics.json").read_text())
    assert metrics["pruned"] == json.loads((place / "pruned" / "metrics.json").read_text())["pruned"]
    assert metrics["finetuned"]["cosine"] > 0.9
    assert AutoTokenizer.from_pretrained(out / "model")("red")["input_ids"] == [1, 11, 2]
