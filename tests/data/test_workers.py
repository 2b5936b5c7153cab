"""The default number of loader processes."""

import logging
import multiprocessing
import os
import warnings
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from isoprune_hf.data import workers
from isoprune_hf.data.loading import ImageLoader
from isoprune_hf.data.workers import available_cpus, choose_workers


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the cgroup folder of a machine of 8 CPUs without a quota, with one rank."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")
    monkeypatch.setattr(workers, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


@pytest.mark.parametrize(("images", "ranks", "count"), [(10**6, 1, 8), (10**6, 3, 2), (10**6, 9, 0), (3000, 1, 2)])
def test_ranks_share_the_cpus(images: int, ranks: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert choose_workers(None, images) == count
    assert choose_workers(5, images) == 5


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_quota_of_a_container_counts(files: dict[str, str], cpus: int, machine: Path) -> None:
    (machine / "cpu").mkdir()
    for name, text in files.items():
        (machine / name).write_text(text)
    assert available_cpus() == cpus


def test_no_process_where_it_imports_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert choose_workers(None, 10**6) == 0


def test_too_many_workers_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    workers._warn_of_many.cache_clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "isoprune_hf"):
        warnings.simplefilter("error")
        for _ in range(3):
            ImageLoader(Dataset(), [[0]], num_workers=64)
    assert len(caplog.records) == 1 and "64" in caplog.text
