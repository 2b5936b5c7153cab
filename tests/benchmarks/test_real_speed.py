"""The benchmark of milliseconds on real weights: cuts of equal time, and its tables."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import real_speed
from real_speed import macs_of_equal_time, read_rows, write_table

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("shares", "expected"), [({"50.00%": 1.25, "40.00%": 1.005}, 0.4), ({"50.00%": 0.995}, 0.5)])
def test_macs_of_equal_time_are_corrected(
    shares: dict[str, float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cut to half of the MACs takes 1.25 times as long as wanted: 0.5 / 1.25 is tried next.
    tried: list[str] = []

    def prune(base, recipe, images, *, scores) -> SimpleNamespace:
        tried.append(recipe.target_macs)
        assert recipe.reconstruct == "none" and recipe.round_to == 8
        return SimpleNamespace(model=recipe.target_macs)

    monkeypatch.setattr(real_speed, "prune_model", prune)
    monkeypatch.setattr(real_speed.ImportanceScores, "load", lambda file: file.name)
    monkeypatch.setattr(real_speed, "count_cost", lambda model: SimpleNamespace(macs={"net": 100, "cut": 50}[model]))
    monkeypatch.setattr(real_speed, "time_onnx", lambda models, _: {"time": 2.0, "macs": 2.0 * shares[models["macs"]]})
    photographs = SimpleNamespace(batches=lambda indices, size: [])
    net = SimpleNamespace(
        name="lite0", model="net", seed=0, photographs=photographs, calibration=lambda count: list(range(count))
    )
    args = argparse.Namespace(workdir=Path(), images=200, repeats=5)
    assert macs_of_equal_time(net, "cut", {"round_to": 8}, args) == pytest.approx(expected)
    assert tried == list(shares)


def test_later_rows_replace_earlier_ones(tmp_path: Path) -> None:
    figures = {"top1": 80.04, "error": 1.76, "agreement": 85.0, "loss": 0.966, "kl": 0.283}
    row = {"kind": "budgets", "net": "lite0", "name": "dense", "ms": 9.0, "macs": 1.0, **figures}
    step = {**row, "kind": "steps", "name": "onnx", "megabytes": 15.61}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in (row, step, {**row, "ms": 5.255})))
    tables = read_rows(file)
    assert write_table(tables, "budgets").splitlines()[2:] == [
        "| lite0 | dense | 5.25 | 100.0 | 80.0 ± 1.8 | 85.0 | 0.97 | 0.28 |"
    ]
    assert write_table(tables, "steps").splitlines()[2:] == [
        "| lite0 | onnx | 9.00 | 15.6 | 80.0 ± 1.8 | 85.0 | 0.97 | 0.28 |"
    ]


@pytest.mark.parametrize(("kind", "page"), [("budgets", "benchmark.md"), ("steps", "export.md")])
def test_published_tables_are_those_of_rows(kind: str, page: str) -> None:
    tables = read_rows(ROOT / "benchmarks" / "results" / "real_speed.jsonl")
    assert write_table(tables, kind) in (ROOT / "docs" / page).read_text(encoding="utf-8")
