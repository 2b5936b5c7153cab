"""Training on a stream: the order of its images, and that a killed run resumes byte for byte."""

import itertools
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.command_line import read, refuse, succeed
from helpers.imagenet_cut import VIT, offline_on_cpu
from helpers.images import write_tar
from helpers.ranks import run, start_ranks, write_slowly
from PIL import Image

from isoprune_hf.data.dataset import load_data
from isoprune_hf.data.loading import Ranks
from isoprune_hf.data.streaming import StreamedSplit
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe
from isoprune_hf.training import run as run_module

CACHED = ["--finetune.teacher_cache", "cache", "--finetune.hflip", "0", "--finetune.crop_scale", "[1,1]"]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two shards for training, with 6 and 5 images of grey values 0 to 10, and one for evaluation.

    Tests that change a shard copy them.
    """
    root = tmp_path_factory.mktemp("tars")
    shards = {"train-0": range(6), "train-1": range(6, 11), "val-0": range(3)}
    for name, numbers in shards.items():
        write_tar(root / f"{name}.tar", {f"{name}-{number}": number % 3 for number in numbers})
    return root


def names(rows: Iterator[dict]) -> list[str]:
    return [row["image"]["path"] for row in rows]


def streamed(tars: Path, buffer: int = 4) -> StreamedSplit:
    loaded = load_data(DataRecipe(dataset=str(tars), streaming=True, shuffle_buffer=buffer))
    assert (loaded.label_names, len(loaded.evaluation), loaded.buffer) == (("0", "1", "2"), 3, buffer)
    return StreamedSplit(loaded.train, 3, buffer)


def test_stream_pass_has_each_image_once(tars: Path) -> None:
    split = streamed(tars)
    first = names(split.rows(0, 1))
    assert sorted(first) == sorted({f"train-{shard}-{number}.png" for shard, number in numbered()})
    assert names(split.rows(0, 1)) == first
    others = [names(split.rows(0, 2)), names(split.rows(1, 1))]
    assert all(sorted(other) == sorted(first) and other != first for other in others)


def numbered() -> list[tuple[int, int]]:
    return [(0, number) for number in range(6)] + [(1, number) for number in range(6, 11)]


def test_ranks_share_a_stream_and_start_over(tars: Path) -> None:
    split = streamed(tars)
    parts = [names(split.rows(0, 1, Ranks(rank, world=2))) for rank in (0, 1)]
    assert not set(parts[0]) & set(parts[1]) and len(parts[0]) + len(parts[1]) == 11
    again = names(itertools.islice(split.endless(0, 1, Ranks(0, world=2)), 2 * len(parts[0])))
    assert again[: len(parts[0])] == parts[0]
    assert len(Counter(again)) >= 5
    assert len(split.take(5, 0)) == 5 and len(split.take(50, 0)) == 11


def test_stream_label_out_of_range_raises(tars: Path) -> None:
    split = StreamedSplit(streamed(tars).stream, 2, 4)
    with pytest.raises(DatasetError, match=r"data: .* label 2; .* 0 to 1"):
        list(split.rows(0, 1))


def test_stream_of_numbers_needs_class_names(tars: Path, tmp_path: Path) -> None:
    tars = shutil.copytree(tars, tmp_path / "tars")
    (tars / "val-0.tar").unlink()
    with pytest.raises(DatasetError, match=r"data\.label_column"):
        load_data(DataRecipe(dataset=str(tars), streaming=True))
    (tars / "classes.txt").write_text("cat\ndog\nowl\n")
    loaded = load_data(DataRecipe(dataset=str(tars), streaming=True))
    assert loaded.label_names == ("cat", "dog", "owl") and loaded.evaluation is None


def test_other_kinds_of_data_are_streams_too(tmp_path: Path) -> None:
    digits = load_data(DataRecipe(dataset="digits", streaming=True))
    assert digits.label_names == tuple("0123456789") and len(digits.evaluation) == 450
    whole = load_data(DataRecipe(dataset="digits"))
    whole.train.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    datasets.DatasetDict(train=whole.train).save_to_disk(str(tmp_path / "arrow"))
    for split, label in (("train", "a"), ("val", "a")):
        (tmp_path / "folder" / split / label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "folder" / split / label / "0.png")
    for kind, images in (("parquet", 1347), ("arrow", 1347), ("folder", 1)):
        loaded = load_data(DataRecipe(dataset=str(tmp_path / kind), streaming=True))
        split = StreamedSplit(loaded.train, len(loaded.label_names), 10)
        labels = [row["label"] for row in split.rows(0, 1)]
        assert len(labels) == images
        assert images == 1 or Counter(labels) == Counter(whole.train["label"])


@pytest.fixture(scope="module", autouse=True)
def offline_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with offline_on_cpu(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def command(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A finetuning on a stream, but for its output."""
    folder = tmp_path_factory.mktemp("cut") / "pruned"
    base = [*VIT, "--prune.num_labels", "data", "--prune.criterion", "taylor", "--prune.batch_size", "4"]
    stream = ["--data.dataset", str(tars), "--data.streaming", "true", "--data.shuffle_buffer", "4"]
    succeed("prune", *base, *stream, "--output", folder)
    assert read(folder, "metrics.json")["pruned"]["images"] == 3
    tuning = {"epochs": 2, "batch_size": 4, "steps_per_epoch": 4, "state_every": 1, "virtual_replicas": 2}
    flags = [part for name, value in tuning.items() for part in (f"--finetune.{name}", str(value))]
    return ["finetune", "--model", str(folder), *stream, *flags]


@pytest.mark.parametrize(
    "world", [pytest.param(1, marks=pytest.mark.kills), pytest.param(2, marks=pytest.mark.faults)]
)
def test_killed_stream_run_resumes_with_any_workers(world: int, command: list[str], tmp_path: Path) -> None:
    ended = [rank.wait() for rank in start_ranks([*command, "--output", tmp_path / "alone"], tmp_path / "log", world)]
    assert [end.code for end in ended] == [0] * world, ended[0].err
    out = tmp_path / "out"
    ranks = start_ranks(
        [*command, "--output", out], tmp_path / "log", world, before=partial(write_slowly, run_module, 0.1)
    )
    assert ranks[0].wait_for(lambda: any(out.glob("checkpoints/training/0002-*2")))
    for rank in ranks:
        rank.send(signal.SIGKILL)
        rank.wait()
    again = [*command, "--data.num_workers", "2", "--output", out]
    ended = [rank.wait() for rank in start_ranks(again, tmp_path / "log", world)]
    assert [end.code for end in ended] == [0] * world, ended[0].err
    assert "resuming after update" in ended[0].out
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()
    assert "training on a stream" in ended[0].out


@pytest.mark.kills
def test_broken_stream_image_is_one_line(command: list[str], tmp_path: Path, tars: Path) -> None:
    broken = shutil.copytree(tars, tmp_path / "tars")
    (broken / "train-1.tar").unlink()
    write_tar(broken / "train-1.tar", {"good": 0}, other=b"x")
    with (broken / "train-1.tar").open("r+b") as file:  # the first image's pixels
        content = file.read()
        place = content.index(b"IDAT")
        file.seek(place)
        file.write(b"X" * 20)
    ended = run([*command, "--data.dataset", broken, "--output", tmp_path / "out"], tmp_path / "log")
    assert ended.code == 2 and ended.err.count("\n") == 1 and "good.png cannot be read" in ended.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--finetune.repeated_augmentation", "2"], "finetune.repeated_augmentation does not work with a stream"),
        (CACHED, "finetune.teacher_cache does not work with a stream"),
        (["--data.broken", "skip"], "data.broken skip does not work with a stream"),
        (["--finetune.steps_per_epoch", "null"], "finetune.steps_per_epoch is not set"),
    ],
)
def test_unsupported_stream_settings_raise(flags: list[str], words: str, command: list[str], tmp_path: Path) -> None:
    assert words in refuse(*command, *flags, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_per_epoch_shorten_a_map_style_epoch(command: list[str], tmp_path: Path) -> None:
    wanted = [*command, "--data.streaming", "false", "--finetune.steps_per_epoch", "1", "--output", tmp_path / "out"]
    succeed(*wanted, "--finetune.log_every", "1")
    lines = (tmp_path / "out" / "checkpoints" / "training" / "log.jsonl").read_text().splitlines()
    updates = [entry["update"] for entry in map(json.loads, lines) if "update" in entry]
    assert updates == [1, 1]
    assert np.isfinite(read(tmp_path / "out", "metrics.json")["finetuned"]["loss"])
