"""Fitted times are kept for the next run, and a file that cannot be used costs a line and a measurement."""

import json
from pathlib import Path

import pytest

from isoprune_hf.errors import WriteError
from isoprune_hf.pruning.cost import latency_cache
from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.latency_cache import remembered

RECORD = {"device": "cpu", "threads": 1}
FITTED = LatencyModel(1.5, {"fc1": (0.25, 1e-7), "fc2": (0.0, 0.1)}, RECORD, 16)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(latency_cache, "cache_folder", lambda: tmp_path)
    return tmp_path


def fit_once(conditions: dict[str, object]) -> tuple[LatencyModel, int]:
    """Return the latency model for some conditions, and how often it was fitted."""
    fits = []

    def fit() -> LatencyModel:
        fits.append(1)
        return FITTED

    return remembered(conditions, FITTED.layers, RECORD, fit), len(fits)


def times_of(model: LatencyModel) -> tuple[object, ...]:
    return model.fixed, model.layers, model.record, model.multiple


def test_second_run_takes_the_times_of_the_first(folder: Path) -> None:
    runs = [fit_once({"threads": threads}) for threads in (1, 1, 2, 1)]
    assert [fits for _, fits in runs] == [1, 0, 1, 0]
    assert all(times_of(model) == times_of(FITTED) for model, _ in runs)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        '{"fixed": 1.5}',
        '{"fixed": 1.5, "layers": {"fc1": [0.25, 1e-7]}}',
        '{"fixed": 1.5, "layers": {"fc1": [0.25], "fc2": [0, 0.1]}}',
        '{"fixed": -1, "layers": {"fc1": [0.25, 1e-7], "fc2": [0, 0.1]}}',
        '{"fixed": NaN, "layers": {"fc1": [0.25, 1e-7], "fc2": [0, 0.1]}}',
        '{"fixed": true, "layers": {"fc1": ["0.25", 1e-7], "fc2": [0, 0.1]}}',
        '{"fixed": 1.5, "layers": [[0.25, 1e-7], [0, 0.1]]}',
        '{"fixed": 1.5, "layers": {"fc1": [0.25, 1e-7], "fc2": [0, 0.1]}}',
        '{"fixed": 1.5, "layers": {"fc1": [0.25, 1e-7], "fc2": [0, 0.1]}, "multiple": 0}',
        '{"fixed": 1.5, "layers": {"fc1": [0.25, 1e-7], "fc2": [0, 0.1]}, "multiple": "16"}',
    ],
)
def test_damaged_file_is_measured_again(content: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit_once({})
    (file,) = folder.iterdir()
    sound = file.read_text(encoding="utf-8")
    file.write_text(content, encoding="utf-8")
    model, fits = fit_once({})
    assert fits == 1 and times_of(model) == times_of(FITTED)
    assert [record.getMessage().startswith(f"{file} is damaged") for record in caplog.records] == [True]
    assert file.read_text(encoding="utf-8") == sound and json.loads(sound)["fixed"] == 1.5


def refuse(*_: object) -> Path:
    raise WriteError("the disk is full")


@pytest.mark.parametrize("name", ["cache_folder", "write_file"])
def test_times_are_fitted_without_a_folder(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(latency_cache, name, refuse)
    assert [fit_once({})[1] for _ in range(2)] == [1, 1]
    expected = "the times of layers are not kept for the next run: the disk is full"
    assert [record.getMessage() for record in caplog.records] == [expected] * 2
