"""Killed scorings: the same command, run again in a real process, writes the same bytes."""

import errno
import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
from helpers.command_line import succeed
from helpers.ranks import Ended, Process, run, start_ranks, write_slowly
from PIL import Image

from isoprune_hf.pruning.calibration import resumable

MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
OTHERS = ("activation_variance", "hessian", "trial_loss")
CRITERIA = ["taylor", *(pytest.param(name, marks=pytest.mark.kills) for name in OTHERS)]


class Case(NamedTuple):
    """A command without criterion and output, and the bytes that it writes if it is not interrupted, by criterion."""

    root: Path
    command: list[str]

    def undisturbed(self, criterion: str) -> bytes:
        path = self.root / f"{criterion}.safetensors"
        if not path.exists():
            succeed(*self.command, "--prune.criterion", criterion, "--output", path)
        return path.read_bytes()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("resumable")
    rng = np.random.default_rng(0)
    for label in range(6):
        (root / "images" / "train" / f"class{label}").mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / "train" / f"class{label}" / f"{number}.png")
    command = ["score", "--prune.model", "timm/vit_tiny_patch16_224", "--prune.pretrained", "false"]
    command += ["--prune.num_labels", "6", "--prune.model_args", json.dumps(MODEL_ARGS), "--prune.batch_size", "2"]
    command += ["--prune.calibration_batches", "12", "--data.dataset", str(root / "images"), "--data.holdout", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield Case(root, command)
        datasets.enable_progress_bars()


def states(folder: Path, rank: int = 0) -> list[Path]:
    return sorted(folder.glob(f".out.scoring-{rank}/*/0001-*"))


def kill_after(command: list[str], folder: Path, number: int) -> None:
    process = Process(command, folder / "log", before=partial(write_slowly, resumable, 0.05))
    assert process.wait_for(lambda: bool(states(folder)) and int(states(folder)[-1].name[5:]) >= number)
    process.send(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert not (folder / "out").exists() and states(folder)


def assert_same(ended: Ended, folder: Path, expected: bytes) -> None:
    assert (ended.code, ended.err) == (0, "")
    assert (folder / "out").read_bytes() == expected
    assert not [path for path in folder.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_killed_twice_gives_the_same_bytes(criterion: str, case: Case, tmp_path: Path) -> None:
    command = [*case.command, "--prune.criterion", criterion, "--prune.state_minutes", "0"]
    command += ["--output", str(tmp_path / "out")]
    for number in (2, 5):
        kill_after(command, tmp_path, number)
    ended = run(command, tmp_path / "log")
    assert "scoring resumes after micro-batch " in ended.out
    assert_same(ended, tmp_path, case.undisturbed(criterion))


@pytest.mark.kills
def test_two_killed_ranks_resume_from_their_own_states(case: Case, tmp_path: Path) -> None:
    command = [*case.command, "--prune.criterion", "taylor", "--prune.state_minutes", "0"]
    paired = start_ranks([*command, "--output", str(tmp_path / "paired")], tmp_path / "log")
    assert [rank.wait().code for rank in paired] == [0, 0]
    command += ["--output", str(tmp_path / "out")]
    ranks = start_ranks(command, tmp_path / "log", before=partial(write_slowly, resumable, 0.05))
    assert ranks[0].wait_for(lambda: all(states(tmp_path, rank) for rank in (0, 1)))
    for rank in ranks:
        rank.send(signal.SIGKILL)
    assert [rank.wait().code for rank in ranks] == [-signal.SIGKILL] * 2
    ended = [rank.wait() for rank in start_ranks(command, tmp_path / "log")]
    assert "scoring resumes after micro-batch " in ended[0].out
    assert_same(ended[0], tmp_path, (tmp_path / "paired").read_bytes())


@pytest.mark.kills
def test_damaged_states_are_skipped_down_to_the_beginning(case: Case, tmp_path: Path) -> None:
    command = [*case.command, "--prune.criterion", "taylor", "--prune.state_minutes", "0"]
    command += ["--output", str(tmp_path / "out")]
    kill_after(command, tmp_path, 3)
    *_, older, newest = states(tmp_path)  # three, if it was killed before it took one away
    damage(newest)
    ended = run(command, tmp_path / "log")
    assert f"scoring resumes after micro-batch {int(older.name[5:])}" in ended.out
    assert_same(ended, tmp_path, case.undisturbed("taylor"))
    (tmp_path / "out").unlink()
    kill_after(command, tmp_path, 3)
    for path in states(tmp_path):
        damage(path)
    ended = run(command, tmp_path / "log")
    assert "scoring restarts from the beginning: no saved state in " in ended.out and "resumes" not in ended.out
    assert_same(ended, tmp_path, case.undisturbed("taylor"))


def damage(state: Path) -> None:
    content = bytearray((state / "tensors.safetensors").read_bytes())
    content[-5] ^= 1
    (state / "tensors.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    "other",
    [
        ["--prune.seed", "1"],
        pytest.param(["--prune.criterion", "taylor_l2"], marks=pytest.mark.families),
        pytest.param(["--data.resize", "20"], marks=pytest.mark.families),
    ],
    ids=lambda o: o[0],
)
def test_different_scoring_ignores_a_saved_state(other: list[str], case: Case, tmp_path: Path) -> None:
    command = [*case.command, "--prune.criterion", "taylor", "--prune.state_minutes", "0"]
    kill_after([*command, "--output", str(tmp_path / "out")], tmp_path, 2)
    succeed(*command, *other, "--output", tmp_path / "alone")
    ended = run([*command, *other, "--output", str(tmp_path / "out")], tmp_path / "log")
    assert "resumes" not in ended.out
    assert_same(ended, tmp_path, (tmp_path / "alone").read_bytes())


def test_full_disk_loses_states_but_not_the_scoring(case: Case, tmp_path: Path) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command = [*case.command, "--prune.criterion", "taylor", "--prune.state_minutes", "0"]
    ended = run(
        [*command, "--output", str(tmp_path / "out")],
        tmp_path / "log",
        before=lambda: setattr(resumable, "write_snapshot", full),
    )
    assert "cannot save the state of the scoring in" in ended.out
    assert "(No space left on device); scoring continues" in ended.out
    assert_same(ended, tmp_path, case.undisturbed("taylor"))


def test_short_scoring_writes_no_states(case: Case, tmp_path: Path) -> None:
    before = lambda: setattr(resumable, "write_snapshot", None)  # noqa: E731
    command = [*case.command, "--prune.criterion", "taylor", "--output", str(tmp_path / "out")]
    assert_same(run(command, tmp_path / "log", before=before), tmp_path, case.undisturbed("taylor"))
