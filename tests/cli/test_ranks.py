"""The command line on two ranks: forked, and started by torchrun and by `accelerate launch`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.command_line import leftovers, read
from helpers.evaluation import numbers_of
from helpers.imagenet_cut import TAYLOR
from helpers.ranks import start_ranks

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("offline_cpu")


def check_figures(out: str, cut_folder: Path) -> None:
    figures, expected = json.loads(out), read(cut_folder, "metrics.json")["pruned"]
    wanted = numbers_of(expected)
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert figures["data"] == expected["data"]
    assert figures["images"] == 20


def check_cut(folder: Path, out: str, cut_folder: Path) -> None:
    """Check that a cut is that of one rank, and that only the main process printed."""
    assert (folder / "pruning_plan.json").read_bytes() == (cut_folder / "pruning_plan.json").read_bytes()
    for name in ("base", "pruned"):
        first, second = (read(one, "metrics.json")[name] for one in (folder, cut_folder))
        assert numbers_of(first) == pytest.approx(numbers_of(second), rel=1e-6)
    assert out.count("score on 39 images in micro-batches of 3") == 1
    assert out.count("The model is in") == 1


def test_two_ranks_make_plan_of_one(images: Path, cut_folder: Path, tmp_path: Path) -> None:
    command = ["prune", *TAYLOR, "--data.dataset", images, "--output", tmp_path / "two"]
    ended = [rank.wait() for rank in start_ranks(command, tmp_path / "log")]
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert leftovers(tmp_path) == []
    check_cut(tmp_path / "two", ended[0].out + ended[1].out, cut_folder)


def test_two_ranks_evaluate_like_one(images: Path, cut_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(cut_folder, tmp_path / "evaluated")
    command = ["evaluate", "--model", tmp_path / "evaluated", "--data.dataset", images, "--json"]
    ended = [rank.wait() for rank in start_ranks(command, tmp_path / "log")]
    assert [end.code for end in ended] == [0, 0], ended[0].err
    check_figures(ended[0].out, cut_folder)
    assert ended[1].out == ""


# Launchers

# Writes to a file, when a rank ends, how many ranks accelerate saw.
NOTE_RANKS = """
import atexit, os, sys

@atexit.register
def note() -> None:
    if "RANK" in os.environ and "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"].PartialState()
        with open(os.path.join(os.environ["RANK_NOTES"], str(state.process_index)), "w") as file:
            file.write(str(state.num_processes))
"""


class Launched(NamedTuple):
    """End of a launched command; `ranks` maps each rank to the number of ranks that it saw."""

    code: int
    out: str
    err: str
    ranks: dict[str, str]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launch(launcher: str, command: list[object], folder: Path) -> Launched:
    """Run a command of train_accelerate.py on two ranks that a launcher starts."""
    started = {
        "torchrun": "torch.distributed.run --nproc_per_node 2 --master_port",
        "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port",
    }[launcher].split()
    notes = folder / "ranks"
    notes.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(NOTE_RANKS)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment.pop("ACCELERATE_USE_CPU")  # a user sets no such thing
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "RANK_NOTES": str(notes)}
    line = [sys.executable, "-m", *started, free_port(), str(ROOT / "train_accelerate.py"), *map(str, command)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    ranks = {path.name: path.read_text() for path in sorted(notes.iterdir())}
    return Launched(done.returncode, done.stdout, done.stderr, ranks)


@pytest.mark.launch
def test_accelerate_launch_makes_plan_of_one_rank(images: Path, cut_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "pruned"
    command = ["prune", *TAYLOR, "--data.dataset", images, "--output", output]
    finished = launch("accelerate", command, tmp_path / "launch")
    assert finished.code == 0, finished.err
    assert finished.ranks == {"0": "2", "1": "2"}
    assert leftovers(output.parent) == []
    check_cut(output, finished.out, cut_folder)


@pytest.mark.faults
def test_torchrun_evaluates_like_one_rank(images: Path, cut_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(cut_folder, tmp_path / "evaluated")
    command = ["evaluate", "--model", tmp_path / "evaluated", "--data.dataset", images, "--json"]
    finished = launch("torchrun", command, tmp_path / "launch")
    assert finished.code == 0, finished.err
    assert finished.ranks == {"0": "2", "1": "2"}
    check_figures(finished.out, cut_folder)
