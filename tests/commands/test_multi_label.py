"""Lists of classes for each image, through the stages of the command line."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.command_line import read, refuse, succeed
from helpers.imagenet_cut import offline_on_cpu
from helpers.shapes import SHAPES, SIDE, draw_shapes, shape_rows, write_shapes
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from isoprune_hf import evaluate_model, finetune, load_base, load_data, prune
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe

SIZES = {"image_size": SIDE, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CUT = ["--target-macs", "50%", "--prune.batch_size", "16", "--prune.calibration_batches", "4"]
TRAINING = ["--finetune.epochs", "1", "--finetune.batch_size", "16", "--finetune.hflip", "0"]


@pytest.fixture(scope="module", autouse=True)
def offline_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with offline_on_cpu(tmp_path_factory.mktemp("cache")):
        yield


def save_base(folder: Path, problem: str | None, rows: int = 0) -> Path:
    """Write a ViT with the classes of the shapes, trained on so many pictures."""
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, intermediate_size=64, id2label=dict(enumerate(SHAPES)), problem_type=problem)
    model, processor = ViTForImageClassification(config), ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    if rows:
        drawn = shape_rows(rows, seed=7)
        pixels = processor(drawn["image"][:], return_tensors="pt")["pixel_values"]
        targets = torch.zeros(rows, 3)
        for target, labels in zip(targets, drawn["label"], strict=True):
            target[labels] = 1
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(pixels).logits, targets).backward()
            optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of pictures `data`, of the trained base `tagger`, and of its cut `cut`."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root / "data", images=64)
    save_base(root / "tagger", "multi_label_classification", rows=160)
    succeed("prune", root / "tagger", "--data", root / "data", *CUT, "--output", root / "cut")
    return root


def test_cut_keeps_the_mean_average_precision(root: Path) -> None:
    metrics = read(root / "cut", "metrics.json")
    assert metrics["base"]["map"] > 0.9 and metrics["pruned"]["map"] > metrics["base"]["map"] - 0.05
    assert metrics["pruned"]["images"] == 64 and "top1" not in metrics["pruned"]
    config = AutoConfig.from_pretrained(root / "cut")
    assert config.problem_type == "multi_label_classification" and [*config.id2label.values()] == [*SHAPES]
    found = evaluate_model(
        load_base(str(root / "cut")).model,
        load_data(DataRecipe(dataset=str(root / "data"))).evaluation,
        load_base(str(root / "cut")).processor,
    )
    assert found == {name: metrics["pruned"][name] for name in ("map", "loss", "images")}


def test_pipeline_gives_a_probability_of_each_class(root: Path) -> None:
    answers = pipeline("image-classification", model=str(root / "cut"))(draw_shapes(["bar", "disc"], 900))
    found = {answer["label"]: answer["score"] for answer in answers}
    assert min(found["bar"], found["disc"]) > 0.5 > found["frame"]


def test_card_names_the_figure(root: Path) -> None:
    card = (root / "cut" / "README.md").read_text(encoding="utf-8")
    assert "- multi-label-classification\n" in card and "name: mean average precision" in card
    assert "| mAP % |" in card and "top-1" not in card and "logits.sigmoid()" in card
    assert "Mean average precision was measured only on the data above" in card


def test_finetuned_cut_is_as_good(root: Path, tmp_path: Path) -> None:
    command = ["finetune", root / "cut", "--data", root / "data", *TRAINING, "--output", tmp_path / "out"]
    assert "mAP %" in succeed(*command)
    metrics = read(tmp_path / "out", "metrics.json")
    assert metrics["finetuned"]["map"] > 0.9
    assert metrics["base"] == read(root / "cut", "metrics.json")["base"]
    line = refuse(*command, "--overwrite", "true", "--finetune.distillation", "hard")
    assert "finetune.distillation hard takes the top class of the teacher" in line


def test_figures_of_each_class_are_written(root: Path, tmp_path: Path) -> None:
    output = succeed("evaluate", root / "cut", "--data", root / "data", "--per_class", tmp_path / "classes.csv")
    assert "mAP %" in output
    rows = [*csv.DictReader((tmp_path / "classes.csv").open())]
    mean = sum(float(row["average_precision"]) for row in rows) / 3
    assert mean == pytest.approx(read(root / "cut", "metrics.json")["pruned"]["map"])


def test_new_head_takes_the_type_of_the_labels(root: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "one", "single_label_classification")
    line = refuse("evaluate", base, "--data", root / "data")
    assert "config.problem_type of the model is single_label_classification" in line and "--num_labels data" in line
    flags = ["--prune.criterion", "l1", "--prune.ratio", "0.5", "--prune.num_labels", "data"]
    succeed("prune", base, "--data", root / "data", *flags, "--output", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").problem_type == "multi_label_classification"


@pytest.mark.faults
def test_pruned_folder_is_finetuned_on_lists(root: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "one", "single_label_classification")
    succeed("prune", base, "--prune.criterion", "l1", "--prune.ratio", "0.5", "--output", tmp_path / "cut")
    command = ["finetune", tmp_path / "cut", "--data", root / "data", *TRAINING, "--output", tmp_path / "out"]
    assert "problem_type" in refuse(*command)
    succeed(*command, "--num_labels", "data")
    assert AutoConfig.from_pretrained(tmp_path / "out").problem_type == "multi_label_classification"
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_labels == 3


def test_model_without_type_takes_that_of_lists(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_base(tmp_path / "any", None)
    with caplog.at_level(logging.WARNING):
        images = load_data(DataRecipe(dataset=str(root / "data")))
        found = prune(str(base), images, criterion="taylor", ratio=0.5, batch_size=8, calibration_batches=2)
    assert "the model has no problem type, so it is one of multi_label_classification" in caplog.text
    assert found.loss == "binary_cross_entropy" and found.config.problem_type == "multi_label_classification"
    history = finetune(found, images, recipe=FinetuneRecipe(epochs=1, batch_size=16))["history"]
    assert history[-1]["map"] == evaluate_model(found, images.evaluation)["map"]


@pytest.mark.faults
def test_other_stages_take_lists(root: Path, tmp_path: Path) -> None:
    data, tagger = ["--data", root / "data"], root / "tagger"
    succeed("score", tagger, *data, *CUT[2:], "--output", tmp_path / "scores.safetensors")
    succeed("prune", tagger, *data, *CUT, "--scores", tmp_path / "scores.safetensors", "--output", tmp_path / "again")
    assert read(tmp_path / "again", "metrics.json")["pruned"] == read(root / "cut", "metrics.json")["pruned"]
    assert "passes" in succeed("plan", "cost", tagger, *data, *CUT)
    succeed("doctor", root / "cut")
    succeed("push", root / "cut", "--repo", "user/name", "--dry_run", "true")
    succeed("inspect", tagger, *data, *CUT[2:], "--html", tmp_path / "inspect.html")
    output = succeed("frontier", tagger, *data, *CUT[2:], "--sizes", "60%,40%", "--output", tmp_path / "sizes")
    rows = [*csv.DictReader((tmp_path / "sizes" / "frontier.csv").open())]
    assert "mAP %" in output and all(0.5 < float(row["map"]) <= 1 for row in rows)


@pytest.mark.faults
def test_run_and_export_take_lists(root: Path, tmp_path: Path) -> None:
    data = ["--data", root / "data"]
    output = succeed("run", root / "tagger", *data, *CUT, *TRAINING, "--output", tmp_path / "run")
    assert "pipeline on a held-out image" in output
    command = ["export", tmp_path / "run" / "model", *data, "--precision", "int8", "--output", tmp_path / "int8"]
    assert "mAP %" in succeed(*command)
    figures = read(tmp_path / "int8", "metrics.json")["finetuned+int8"]
    assert figures["map"] > 0.8 and figures["agreement"] > 0.9
    assert "mean average precision" in (tmp_path / "int8" / "README.md").read_text(encoding="utf-8")
