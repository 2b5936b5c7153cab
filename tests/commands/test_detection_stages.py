"""The command line prunes, measures and finetunes a network of object detection without labels."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from helpers.command_line import isoprune, succeed
from helpers.detectors import make_yolos
from PIL import Image
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert
from transformers import AutoModelForObjectDetection

from isoprune_hf.commands.steps import cutting
from isoprune_hf.models.detection_loss import DetectionLoss

CUT = ["--target-macs", "60%", "--prune.round_to", "1", "--prune.criterion", "gate_fisher"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a network, images that are no squares, and the pruned network."""
    place = tmp_path_factory.mktemp("detection")
    make_yolos().save_pretrained(place / "yolos")
    transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(place / "yolos")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        (place / "images" / part).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (30 + 2 * number, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "images" / part / f"{number:02}.png")
    printed = succeed("prune", place / "yolos", *CUT, "--data", place / "images", "--output", place / "pruned")
    assert 'detect = pipeline("object-detection"' in printed and "objects as base %" in printed
    return place


def test_figures_are_those_of_both_networks(place: Path) -> None:
    metrics = json.loads((place / "pruned" / "metrics.json").read_text())
    assert set(metrics["base"]) == {"images", "data", "split"} and metrics["pruned"]["images"] == 4
    dense, cut = (AutoModelForObjectDetection.from_pretrained(place / name).eval() for name in ("yolos", "pruned"))
    square = transformers.YolosImageProcessor(size={"height": 32, "width": 32})
    files = sorted((place / "images" / "val").iterdir())
    pixels = square([Image.open(file) for file in files], return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted, found = dense(pixels), cut(pixels)
    pairs = [(one.logits, one.pred_boxes) for one in (found, wanted)]
    divergence = DetectionLoss(2).distances(*pairs).mean()
    assert metrics["pruned"]["detection_divergence"] == pytest.approx(float(divergence), rel=1e-4)
    assert 0.5 < metrics["pruned"]["same_objects"] <= 1


def write_boxes(place: Path, folder: Path, objects: list[dict[str, list]]) -> Path:
    """Copy the images for evaluation, with their objects."""
    (folder / "val").mkdir(parents=True)
    files = sorted((place / "images" / "val").iterdir())
    for file in files:
        shutil.copy(file, folder / "val" / file.name)
    lines = [{"file_name": file.name, "objects": found} for file, found in zip(files, objects, strict=True)]
    (folder / "val" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_precision_of_boxes_is_measured(place: Path, tmp_path: Path) -> None:
    square = transformers.YolosImageProcessor(size={"height": 32, "width": 32})
    images = [Image.open(file) for file in sorted((place / "images" / "val").iterdir())]
    network = AutoModelForObjectDetection.from_pretrained(place / "pruned").eval()
    with torch.no_grad():
        outputs = network(square(images, return_tensors="pt").pixel_values)
    found = square.post_process_object_detection(outputs, 0.0, [image.size[::-1] for image in images])
    wanted = []
    for one, image in zip(found, images, strict=True):  # two of the boxes that are found, moved a little
        boxes = one["boxes"][:2].round().clamp(min=0)
        boxes[:, 2:] = boxes[:, 2:].minimum(torch.tensor(image.size))
        wanted.append({"boxes": boxes, "labels": one["labels"][:2]})
    metric = MeanAveragePrecision(box_format="xyxy")
    metric.update(found, wanted)
    precision = metric.compute()
    boxes = [box_convert(one["boxes"], "xyxy", "xywh").tolist() for one in wanted]
    objects = [{"bbox": box, "categories": one["labels"].tolist()} for box, one in zip(boxes, wanted, strict=True)]
    data = write_boxes(place, tmp_path / "boxed", objects)
    heads, cells = succeed("evaluate", place / "pruned", "--data", data).splitlines()[-2:]
    shown = dict(zip(re.split(" {2,}", heads), re.split(" {2,}", cells), strict=True))
    for head, name in (("mAP of boxes %", "map"), ("mAP50 of boxes %", "map_50")):
        assert 0 < float(shown[head]) == pytest.approx(100 * float(precision[name]), abs=0.006)


def test_wrong_box_is_one_line(place: Path, tmp_path: Path) -> None:
    data = write_boxes(place, tmp_path / "boxed", [{"bbox": [[5, 4, 37, 12]], "categories": [0]}] * 4)
    done = isoprune("evaluate", place / "pruned", "--data", data)
    line = done.err.strip().splitlines()[-1]
    assert done.code == 2 and line.startswith(
        "isoprune: error: data: the objects of image 0 of its split have the box"
    )


def test_wrong_box_ends_prune_before_cut(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_boxes(place, tmp_path / "boxed", [{"bbox": [[5, 4, 37, 12]], "categories": [0]}] * 4)
    monkeypatch.setattr(cutting, "prune_model", lambda *_, **__: pytest.fail("the cut has begun"))
    words = ["--target-macs", "60%", "--prune.criterion", "l1", "--prune.reconstruct", "none", "--data", data]
    done = isoprune("prune", place / "yolos", *words, "--output", tmp_path / "out")
    assert done.code == 2 and "have the box [5, 4, 37, 12], which reaches out" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.families
def test_doctor_finds_nothing(place: Path) -> None:
    printed = succeed("doctor", place / "pruned")
    assert "FAIL" not in printed and "save-load" in printed


@pytest.mark.families
def test_finetuning_needs_no_labels(place: Path, tmp_path: Path) -> None:
    words = ["--data", place / "images", "--finetune.epochs", "2", "--finetune.learning_rate", "1e-3"]
    succeed("finetune", place / "pruned", *words, "--finetune.batch_size", "6", "--output", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["finetuned"]["same_objects"] > 0.5
    opened = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert opened(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 5, 3)


@pytest.mark.faults
def test_boxes_are_exported_and_compared_at_sizes(place: Path, tmp_path: Path) -> None:
    data = ["--data", place / "images"]
    succeed("export", place / "pruned", *data, "--output", tmp_path / "onnx")
    record, metrics = (json.loads((tmp_path / "onnx" / f"{name}.json").read_text()) for name in ("export", "metrics"))
    assert metrics["pruned+fp32"]["same_objects"] == 1.0
    assert record["outputs"] == ["logits", "pred_boxes"] and record["same_class"] is None
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = AutoModelForObjectDetection.from_pretrained(place / "pruned").eval()(pixels)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    found = session.run(["logits", "pred_boxes"], {"pixel_values": pixels.numpy()})
    for value, name in zip(found, ("logits", "pred_boxes"), strict=True):
        np.testing.assert_allclose(value, wanted[name].numpy(), atol=1e-4)
    settings = ["--prune.round_to", "1", "--prune.criterion", "l1", "--sizes", "80%,60%"]
    succeed("frontier", place / "yolos", *settings, *data, "--output", tmp_path / "sizes")
    _, large, small = csv.DictReader((tmp_path / "sizes" / "frontier.csv").read_text().splitlines())
    assert float(large["macs"]) > float(small["macs"])
    assert all(0 < float(row["detection_divergence"]) < 0.2 < float(row["same_objects"]) for row in (large, small))
