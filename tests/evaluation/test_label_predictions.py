"""The figures of lists of classes: average precision, loss, and the table of the classes."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.evaluation import make_net, make_processor
from helpers.ranks import call_on_ranks
from helpers.shapes import shape_rows
from sklearn.metrics import average_precision_score
from torch import nn

from isoprune_hf.data.label_columns import read_label_lists
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.average_precision import average_precisions
from isoprune_hf.evaluation.evaluate import evaluate_model, predict_split
from isoprune_hf.evaluation.predictions import LabelPredictions


def test_average_precision_by_hand() -> None:
    scores = np.array([[0.9], [0.8], [0.7], [0.6]])
    # Right at ranks 1 and 4: precisions 1 and 2/4, each for half of the recall.
    assert average_precisions(scores, np.array([[1], [0], [0], [1]])) == pytest.approx([0.75])
    # Two equal scores are one threshold: precision 1/2 at recall 1.
    assert average_precisions(np.ones((2, 1)), np.array([[1], [0]])) == pytest.approx([0.5])


def test_average_precision_equals_that_of_scikit() -> None:
    rng = np.random.default_rng(0)
    scores, references = rng.integers(0, 9, (60, 12)).astype(np.float32), rng.random((60, 12)) < 0.3
    references[:, 4] = False
    references[:, 5] = True
    found = average_precisions(scores, references)
    assert math.isnan(found[4]) and found[5] == 1
    known = [number for number in range(12) if number != 4]
    assert found[known] == pytest.approx([average_precision_score(references[:, n], scores[:, n]) for n in known])


def targets_of(rows) -> np.ndarray:
    targets = np.zeros((len(rows), 3))
    for target, labels in zip(targets, read_label_lists(rows), strict=True):
        target[labels] = 1
    return targets


def test_figures_equal_a_loop_over_images() -> None:
    net, rows = make_net(classes=3).eval(), shape_rows(13)
    targets, scores, losses = targets_of(rows), [], []
    for row, target in zip(rows, targets, strict=True):
        logits = net(make_processor()(row["image"], return_tensors="pt")["pixel_values"]).logits[0].detach().numpy()
        chances = 1 / (1 + np.exp(-logits.astype(float)))
        scores.append(logits)
        losses.append(-np.mean(target * np.log(chances) + (1 - target) * np.log(1 - chances)))
    precision = average_precision_score(targets, np.array(scores), average="macro")
    figures = evaluate_model(net, rows, make_processor(), batch_size=4)
    assert figures == pytest.approx({"map": precision, "loss": np.mean(losses), "images": 13})


def test_table_has_a_line_for_each_class() -> None:
    net, rows = make_net(classes=3), shape_rows(9)
    lines = predict_split(net, rows, make_processor(), LoaderOptions()).table(["bar", "disc", "frame"]).splitlines()
    assert lines[0] == "class,name,images,average_precision,predicted"
    counts = [line.split(",")[:3] for line in lines[1:]]
    images = targets_of(rows).sum(0).astype(int).tolist()
    assert counts == [[str(n), name, str(images[n])] for n, name in enumerate(["bar", "disc", "frame"])]


def test_class_without_image_does_not_count() -> None:
    scores = np.array([[2.0, 1.0], [-1.0, 3.0]], np.float32)
    found = LabelPredictions(scores, np.array([[1, 0], [0, 0]], np.uint8), np.array([0.5, 1.5]), 0)
    assert found.figures == {"map": 1.0, "loss": 1.0, "images": 2}
    assert found.table(["a", "b"]).splitlines()[1:] == ["0,a,1,1.0,1", "1,b,0,,2"]
    assert "map" not in found._replace(references=np.zeros((2, 2), np.uint8)).figures
    other = found._replace(scores=np.array([[2.0, -1.0], [-1.0, 3.0]], np.float32))
    assert found.agreement(other) == 0.75


class Fixed(nn.Module):
    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(len(pixel_values), 5))


def test_other_number_of_outputs_is_refused() -> None:
    with pytest.raises(DatasetError, match="lists of 3 classes, and the model has 5 outputs"):
        evaluate_model(Fixed(), shape_rows(2), make_processor())


def evaluate_to(file: Path, images: int, accelerator: Accelerator) -> None:
    figures = evaluate_model(
        make_net(classes=3), shape_rows(images), make_processor(), accelerator=accelerator, batch_size=1
    )
    Path(f"{file}.{accelerator.process_index}").write_text(json.dumps(figures), encoding="utf-8")


@pytest.mark.parametrize("images", [1, 7])
def test_every_rank_has_the_same_figures(images: int, tmp_path: Path) -> None:
    call_on_ranks(functools.partial(evaluate_to, tmp_path / "figures", images), tmp_path)
    wanted = evaluate_model(make_net(classes=3), shape_rows(images), make_processor(), batch_size=1)
    found = [json.loads((tmp_path / f"figures.{rank}").read_text()) for rank in range(2)]
    assert found == [wanted] * 2
