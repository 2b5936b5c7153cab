"""The command line on two ranks: forked, and started by torchrun and by `accelerate launch`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
from helpers.command_line import leftovers, read, succeed
from helpers.imagenet import write_imagenet
from helpers.ranks import start_ranks

ROOT = Path(__file__).parents[2]
MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
# 13 micro-batches of 3 out of 40 images: two ranks get 7 and 6 of them.
TAYLOR = ["--prune.model", "timm/vit_tiny_patch16_224", "--prune.pretrained", "false", "--prune.num_labels", "data"]
TAYLOR += ["--prune.model_args", json.dumps(MODEL_ARGS), "--prune.criterion", "taylor"]
TAYLOR += ["--prune.calibration_batches", "13", "--prune.batch_size", "3"]


@pytest.fixture(scope="module", autouse=True)
def offline_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def pruned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny ViT cut by one rank; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    succeed("prune", *TAYLOR, "--data.dataset", images, "--output", folder)
    return folder


def check_figures(out: str, pruned: Path) -> None:
    size, *_, figures = out.splitlines()
    assert size.startswith("MACs: ")
    assert json.loads(figures) == pytest.approx(read(pruned, "metrics.json")["pruned"], rel=1e-6)
    assert json.loads(figures)["images"] == 20


def test_two_ranks_make_plan_of_one(images: Path, pruned: Path, tmp_path: Path) -> None:
    command = ["prune", *TAYLOR, "--data.dataset", images, "--output", tmp_path / "two"]
    ended = [rank.wait() for rank in start_ranks(command, tmp_path / "log")]
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert (tmp_path / "two" / "pruning_plan.json").read_bytes() == (pruned / "pruning_plan.json").read_bytes()
    assert leftovers(tmp_path) == []
    for name in ("base", "pruned"):
        first, second = (read(folder, "metrics.json")[name] for folder in (tmp_path / "two", pruned))
        assert first == pytest.approx(second, rel=1e-6)
    printed = ended[0].out + ended[1].out
    assert printed.count("score on 39 images in micro-batches of 3") == 1
    assert printed.count("The model is in") == 1


def test_two_ranks_evaluate_like_one(images: Path, pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "evaluated")
    command = ["evaluate", "--model", tmp_path / "evaluated", "--data.dataset", images]
    ended = [rank.wait() for rank in start_ranks(command, tmp_path / "log")]
    assert [end.code for end in ended] == [0, 0], ended[0].err
    check_figures(ended[0].out, pruned)
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

    output: Path
    code: int
    out: str
    err: str
    ranks: dict[str, str]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def launched(images: Path, pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launched]:
    """One rank, and two ranks by torchrun and by `accelerate launch`; they start together to share two cores."""
    root = tmp_path_factory.mktemp("launched")
    (root / "sitecustomize.py").write_text(NOTE_RANKS)
    shutil.copytree(pruned, root / "evaluated")
    prune = ["prune", *TAYLOR, "--data.dataset", str(images), "--output"]
    evaluate = ["evaluate", "--model", str(root / "evaluated"), "--data.dataset", str(images)]
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate += ["--main_process_port", free_port()]
    script = str(ROOT / "train_accelerate.py")
    commands = {
        "one": [script, *prune, str(root / "one")],
        "two": ["-m", *torchrun, script, *prune, str(root / "two")],
        "evaluate": ["-m", *accelerate, script, *evaluate],
    }
    running = {}
    for name, command in commands.items():
        (root / f"{name}_ranks").mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("ACCELERATE_USE_CPU")  # a user sets no such thing
        environment |= {"PYTHONPATH": f"{root}{os.pathsep}{ROOT}", "HF_HOME": str(root / f"{name}_home")}
        environment |= {"RANK_NOTES": str(root / f"{name}_ranks")}
        options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running[name] = subprocess.Popen([sys.executable, *command], **options)
    done = {}
    try:
        for name, process in running.items():
            out, err = process.communicate(timeout=300)
            ranks = {path.name: path.read_text() for path in sorted((root / f"{name}_ranks").iterdir())}
            done[name] = Launched(root / name, process.returncode, out, err, ranks)
    finally:
        for process in running.values():
            process.kill()
    return done


@pytest.mark.launch
def test_torchrun_makes_plan_of_one_rank(launched: dict[str, Launched], pruned: Path) -> None:
    one, two = launched["one"], launched["two"]
    assert one.code == 0, one.err
    assert two.code == 0, two.err
    assert one.ranks == {} and two.ranks == {"0": "2", "1": "2"}
    folders = (one.output, two.output, pruned)
    assert len({(folder / "pruning_plan.json").read_bytes() for folder in folders}) == 1
    assert leftovers(one.output.parent) == []
    for name in ("base", "pruned"):
        first, second = (read(folder, "metrics.json")[name] for folder in folders[:2])
        assert first == pytest.approx(second, rel=1e-6)
    for finished in (one, two):  # only the main process prints
        assert finished.out.count("score on 39 images in micro-batches of 3") == 1
        assert finished.out.count("The model is in") == 1
    assert one.err == ""


@pytest.mark.launch
def test_accelerate_launch_evaluates_like_one_rank(launched: dict[str, Launched], pruned: Path) -> None:
    finished = launched["evaluate"]
    assert finished.code == 0, finished.err
    assert finished.ranks == {"0": "2", "1": "2"}
    check_figures(finished.out, pruned)
