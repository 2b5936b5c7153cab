"""The accuracy benchmark on real weights: their names, the split of the photographs, and the figures."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import real_accuracy_data as data
import torch
from PIL import Image
from real_accuracy import FIGURES, figures_of, read_results, write_table

from isoprune_hf.models import load_base

pytestmark = pytest.mark.benchmarks


def test_tensors_are_renamed_in_their_order() -> None:
    state = {"_conv.weight": torch.ones(2), "_fc.bias": torch.zeros(3)}
    wanted = {"stem.weight": torch.empty(2), "head.bias": torch.empty(3)}
    renamed = data.rename(state, wanted)
    assert renamed["stem.weight"] is state["_conv.weight"] and renamed["head.bias"] is state["_fc.bias"]
    for other in ({"stem.bias": torch.empty(2)}, {"stem.weight": torch.empty(3)}):
        with pytest.raises(ValueError, match="_conv"):
            data.rename(state, {**other, "head.bias": torch.empty(3)})


def test_halves_have_different_classes() -> None:
    labels = torch.arange(10).repeat(3)
    first, second = data.split_classes(labels, 0)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(30))
    assert set(labels[first].tolist()).isdisjoint(labels[second].tolist())
    assert len(first) == len(second) == 15
    assert not torch.equal(first, data.split_classes(labels, 1)[0])


def test_photographs_are_preprocessed_once(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (40, 50), (255, 0, 0)).save(encoded, "PNG")
    table = pa.table({"image": [{"bytes": encoded.getvalue(), "path": None}], "label": [7]})
    pq.write_table(table, tmp_path / "train.parquet")
    processor = load_base("timm/tf_efficientnet_lite0", pretrained=False, num_labels=2).processor
    found = data.open_photographs(tmp_path, processor, tmp_path / "pixels.npy")
    again = data.open_photographs(tmp_path, processor, tmp_path / "pixels.npy")
    assert found.labels.tolist() == [7] and found.pixels.shape == (1, 3, 224, 224)
    assert [found.pixels[0, channel].mean() for channel in range(3)] == [1, -1, -1]
    assert np.array_equal(found.pixels, again.pixels)


def test_figures_are_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    logits, dense = generator.normal(size=(2, 40, 5))
    labels = generator.integers(0, 5, 40)
    p, q = (np.exp(values) / np.exp(values).sum(1, keepdims=True) for values in (logits, dense))
    found = figures_of(torch.tensor(logits), torch.tensor(dense), torch.tensor(labels))
    top1 = (p.argmax(1) == labels).mean()
    assert found["top1"] == pytest.approx(100 * top1)
    assert found["error"] == pytest.approx(100 * np.sqrt(top1 * (1 - top1) / 40))
    assert found["agreement"] == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).mean())
    assert found["loss"] == pytest.approx(-np.log(p[np.arange(40), labels]).mean())
    assert found["kl"] == pytest.approx((q * np.log(q / p)).sum(1).mean())
    assert found["confidence"] == pytest.approx(p.max(1).mean())


def test_table_has_a_row_for_each_split(tmp_path: Path) -> None:
    cell = {"net": "lite0", "method": "best", "budget": 0.7, "images": 200, "held_out": 500}
    values = ((0, 1.0, 4.0), (1, 3.0, 6.0))
    records = [
        {**cell, "seed": seed, "dense": dict.fromkeys(FIGURES, dense), **dict.fromkeys(FIGURES, value)}
        for seed, value, dense in values
    ]
    records.insert(0, {**records[0], "method": "tp_iso", "budget": 0.5})
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in (*records, records[1])))
    results = read_results([file])
    assert len(results) == 3
    table = write_table(results).splitlines()
    assert table[-5].startswith("| lite0 | 0 | dense | 4.0 ± 4.0 / 4.0 / 4.00 / 4.00 / 4.00 / 4.00 | 4.0 ")
    assert table[-4] == "| lite0 | 0 | `best` | 1.0 ± 1.0 (0.25) / 1.0 / 1.00 / 1.00 / 1.00 / 1.00 |  |"
    assert table[-3].startswith("| lite0 | 0 | `tp_iso` |  | 1.0 ± 1.0 (0.25) ")
    assert table[-1] == "| lite0 | 1 | `best` | 3.0 ± 3.0 (0.50) / 3.0 / 3.00 / 3.00 / 3.00 / 3.00 |  |"


def test_finetuned_cells_have_their_own_table() -> None:
    cell = {"net": "resnet20", "method": "best", "budget": 0.5, "images": 256, "held_out": 100, "seed": 0}
    record = {**cell, "dense": dict.fromkeys(FIGURES, 8.0), **dict.fromkeys(FIGURES, 2.0)}
    record |= {"epochs": 3, "after": dict.fromkeys(FIGURES, 4.0)}
    before, after = write_table({("a",): record}).split("\n### ")[1:]
    assert before.startswith("256 calibration images, 100 evaluated\n")
    assert after.startswith("256 calibration images, 100 evaluated, 3 epochs of finetuning\n")
    assert "| `best` | 2.0 ± 2.0 (0.25) /" in before and "| `best` | 4.0 ± 4.0 (0.50) /" in after


@pytest.mark.parametrize("name", ["real_accuracy", "cifar_accuracy"])
def test_published_tables_are_those_of_results(name: str) -> None:
    root = Path(__file__).parents[2]
    table = write_table(read_results([root / "benchmarks" / "results" / f"{name}.jsonl"]))
    assert table in (root / "docs" / "accuracy.md").read_text(encoding="utf-8")
