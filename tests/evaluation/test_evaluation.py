import functools
import io
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.evaluation import TinyNet, calibration_error_by_hand, make_net, make_processor, make_split
from helpers.ranks import call_on_ranks
from tqdm import tqdm

from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.evaluation.evaluate import evaluate_model, predict_split
from isoprune_hf.evaluation.metrics import ImageClassificationMetric, calibration_error

ROOT = Path(__file__).parents[2]


def evaluate_one_by_one(net: TinyNet, split: datasets.Dataset) -> dict[str, float]:
    """Compute the figures image by image in NumPy."""
    net.eval()
    top1 = top5 = loss = 0.0
    confidences, hits = [], []
    for row in split:
        pixel_values = make_processor()(row["image"], return_tensors="pt")["pixel_values"]
        logits = net(pixel_values).logits[0].detach().double().numpy()
        order = np.argsort(-logits).tolist()
        top1 += order[0] == row["label"]
        top5 += row["label"] in order[:5]
        loss += np.log(np.exp(logits).sum()) - logits[row["label"]]
        confidences.append(float(np.exp(logits).max() / np.exp(logits).sum()))
        hits.append(order[0] == row["label"])
    means = {"top1": top1 / len(split), "top5": top5 / len(split), "loss": loss / len(split)}
    return {**means, "ece": calibration_error_by_hand(confidences, hits), "images": len(split)}


def test_metric_equals_a_count_by_hand():
    metrics = ImageClassificationMetric(keep_in_memory=True).compute(
        predictions=[[1, 0, 2, 3, 4], [1, 0, 2, 3, 4], [5, 4, 3, 2, 1], [0, 1, 2, 3, 4]],
        references=[1, 4, 0, 0],
        losses=[1.0, 2.0, 3.0, 6.0],
        confidences=[0.95, 0.97, 0.35, 0.375],
    )
    # Two bins of two images: confidence 0.96 and accuracy 0.5; confidence 0.3625 and accuracy 0.5.
    ece = pytest.approx((2 * 0.46 + 2 * 0.1375) / 4)
    assert metrics == {"top1": 0.5, "top5": 0.75, "loss": 3.0, "ece": ece, "images": 4}


def test_a_bin_of_confidences_includes_its_upper_end():
    confidences, hits = np.asarray([3 / 15, 3.1 / 15]), np.asarray([True, False])
    # Apart: gaps of 0.8 and 3.1 / 15; in one bin they would nearly cancel out.
    assert calibration_error(confidences, hits) == pytest.approx((0.8 + 3.1 / 15) / 2)
    assert calibration_error(np.asarray([1.0, 1.0]), np.asarray([True, False])) == 0.5


def test_class_figures_equal_figures_of_its_images():
    net, split = make_net(), make_split(13)
    predictions = predict_split(net, split, make_processor(), LoaderOptions())
    lines = predictions.table([f"class {n}" for n in range(8)]).splitlines()
    assert lines[0] == "class,name,images,top1,top5,loss,confidence,predicted"
    rows = [line.split(",") for line in lines[1:]]
    assert sum(int(row[2]) for row in rows) == sum(int(row[7]) for row in rows) == 13
    for number, row in enumerate(rows[:7]):
        mine = [at for at, label in enumerate(split["label"]) if label == number]
        assert row[:3] == [str(number), f"class {number}", str(len(mine))]
        if mine:
            want = evaluate_one_by_one(net, split.select(mine))
            assert [float(value) for value in row[3:6]] == pytest.approx([want["top1"], want["top5"], want["loss"]])
        else:
            assert row[3:7] == [""] * 4
    assert rows[7][:7] == ["7", "class 7", "0", "", "", "", ""]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_equals_a_loop_over_images(batch_size):
    net, split = make_net(), make_split(13)
    metrics = evaluate_model(net, split, make_processor(), batch_size=batch_size)
    assert metrics == pytest.approx(evaluate_one_by_one(net, split), rel=1e-6)
    assert 0 < metrics["top1"] < metrics["top5"] < 1


def test_top5_is_one_below_five_classes():
    net, split = make_net(classes=3), make_split(9, classes=3)
    metrics = evaluate_model(net, split, make_processor(), batch_size=2)
    assert metrics["top5"] == 1.0
    assert metrics == pytest.approx(evaluate_one_by_one(net, split), rel=1e-6)


def test_evaluation_leaves_the_model_unchanged():
    net = make_net().train()
    net.norm.eval()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    evaluate_model(net, make_split(5), make_processor())
    assert net.training and net.dropout.training and not net.norm.training
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "rank", "is_shown"), [(Terminal, 0, True), (io.StringIO, 0, False), (Terminal, 1, False)]
)
def test_only_the_main_terminal_shows_a_bar(monkeypatch, stream, rank, is_shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet(), raising=False)  # bars that other tests left open
    accelerator = SimpleNamespace(process_index=rank, num_processes=1, unwrap_model=lambda model: model)
    evaluate_model(make_net(), make_split(5), make_processor(), accelerator=accelerator, batch_size=2)
    shown = sys.stderr.getvalue()
    if is_shown:
        assert "evaluate" in shown and "/3" in shown
    else:
        assert shown == ""


def save_figures(accelerator: Accelerator, folder: Path) -> None:
    """Evaluate splits of 1 to 13 images with batches of 1 to 4."""
    found = {}
    for images in range(1, 14):
        split, batch_size = make_split(13).select(range(images)), images % 4 + 1
        found[images] = evaluate_model(
            make_net(), split, make_processor(), accelerator=accelerator, batch_size=batch_size
        )
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.launch
def test_two_ranks_count_every_image_once(tmp_path):
    call_on_ranks(functools.partial(save_figures, folder=tmp_path), tmp_path / "log")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for images in range(1, 14):
        alone = evaluate_model(make_net(), make_split(13).select(range(images)), make_processor())
        assert ranks[0][str(images)]["images"] == images
        assert ranks[0][str(images)] == pytest.approx(alone, rel=1e-6)
