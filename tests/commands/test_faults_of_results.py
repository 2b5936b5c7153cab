"""Every stage that writes a result, under every fault: the old result, the new one and the files of others survive."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import pytest
import torch
from helpers.command_line import Done, contents, isoprune, leftovers, succeed
from helpers.cut_folders import MODEL_ARGS
from helpers.hub_server import TOKEN, Hub, serve_hub
from helpers.ranks import Process
from helpers.stage_commands import CUT, run_command, training_flags, write_four_classes
from matplotlib.figure import Figure
from timm import create_model

from isoprune_hf.checkpoint import folder as folder_module
from isoprune_hf.checkpoint.finite import require_finite
from isoprune_hf.checkpoint.target import Target, locked_target
from isoprune_hf.commands.steps import recording, results
from isoprune_hf.export import export as export_module
from isoprune_hf.measuring import timing

VIT_ARGS = ["--model_args", json.dumps(MODEL_ARGS)]
KILLS = int(os.environ.get("ISOPRUNE_KILLS", "12"))  # of each stage


class Inputs(NamedTuple):
    """Images, a pruned folder, its plan, and a file of torch.save."""

    images: Path
    pruned: Path
    pickled: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    root = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        succeed("prune", *CUT, "--output", root / "pruned")
        torch.save(create_model("vit_tiny_patch16_224", num_classes=4, **MODEL_ARGS), root / "net.pth")
        yield Inputs(write_four_classes(root / "images"), root / "pruned", root / "net.pth")
        datasets.enable_progress_bars()


def finetune_command(inputs: Inputs) -> list[str]:
    command = ["finetune", "--model", str(inputs.pruned), "--data.dataset", str(inputs.images)]
    return [*command, *training_flags("finetune")]


class Stage(NamedTuple):
    """The words of a stage without its output, the file that makes a folder one of its results, and its output."""

    words: Callable[[Inputs], list[str]]
    mark: str = ""  # none if the result is a file
    out: str = "out"


STAGES = {
    "prune": Stage(lambda inputs: ["prune", *CUT], "config.json"),
    "plan apply": Stage(lambda inputs: ["plan", "apply", str(inputs.pruned), *CUT], "config.json"),
    "convert": Stage(lambda inputs: ["convert", str(inputs.pickled), *VIT_ARGS], "config.json"),
    "finetune": Stage(finetune_command, "config.json"),
    "run": Stage(lambda inputs: run_command(inputs.images), "model/config.json"),
    "frontier": Stage(lambda inputs: ["frontier", *CUT, "--sizes", "0.6"], "frontier.json"),
    "export": Stage(lambda inputs: ["export", str(inputs.pruned), "--format", "torch-export"], "config.json"),
    "score": Stage(lambda inputs: ["score", *CUT], out="out.safetensors"),
    "inspect": Stage(lambda inputs: ["inspect", *CUT], out="out.png"),
}


def occupy(out: Path, patch: pytest.MonkeyPatch, run: Callable[[], Done]) -> Done:
    with locked_target(out):
        return run()


def add_a_file(out: Path, patch: pytest.MonkeyPatch, run: Callable[[], Done]) -> Done:
    """Put a file into the output while the command works."""
    check = Target._check_unchanged

    def add(target: Target, written: Path) -> None:
        if target.real == out:
            out.parent.mkdir(exist_ok=True)
            if not out.suffix:
                out.mkdir(exist_ok=True)
            (out if out.suffix else out / "notes.txt").write_text("mine")
        check(target, written)

    patch.setattr(Target, "_check_unchanged", add)
    return run()


def fill_the_disk(out: Path, patch: pytest.MonkeyPatch, run: Callable[[], Done]) -> Done:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(folder_module, "sync_file", fail)
    return run()


def poison_the_weights(out: Path, patch: pytest.MonkeyPatch, run: Callable[[], Done]) -> Done:
    """Make a weight nan just before the model is saved, as a division by zero does."""

    def poison(model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] = torch.nan
        require_finite(model)

    for module in (folder_module, export_module):
        patch.setattr(module, "require_finite", poison)
    return run()


def break_ornaments(out: Path, patch: pytest.MonkeyPatch, run: Callable[[], Done]) -> Done:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no picture")

    patch.setattr(Figure, "savefig", fail)
    patch.setattr(results, "build_model_card", fail)
    return run()


# Fault -> how it is made, and the exit codes.
FAULTS: dict[str, tuple[Callable[..., Done], set[int]]] = {
    "occupied": (occupy, {73}),
    "file added": (add_a_file, {74}),
    "disk full": (fill_the_disk, {74}),
    "nan": (poison_the_weights, {2, 70}),
    "ornaments": (break_ornaments, {0}),
}
# Of these there is no model to poison, and of inspect the picture is the result.
NOT_TRIED = {("frontier", "nan"), ("score", "nan"), ("inspect", "nan"), ("inspect", "ornaments")}
ALWAYS = {("prune", fault) for fault in FAULTS}
ALWAYS |= {("score", "file added"), ("frontier", "ornaments"), ("inspect", "disk full")}


def table() -> Iterator[Any]:
    for stage in STAGES:
        for fault in FAULTS:
            if (stage, fault) not in NOT_TRIED:
                marks = () if (stage, fault) in ALWAYS else (pytest.mark.faults,)
                yield pytest.param(stage, fault, marks=marks, id=f"{stage}-{fault}")


@pytest.mark.parametrize("stage, fault", table())
def test_fault_loses_no_result_and_no_file(
    stage: str, fault: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (words, mark, name), (make, codes) = STAGES[stage], FAULTS[fault]
    out = tmp_path / name
    old = out / mark
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_text("old")
    before = contents(tmp_path)
    command = [*words(inputs), "--overwrite", "true", "--output", out]
    with monkeypatch.context() as patch:
        ended = make(out, patch, lambda: isoprune(*command))
    assert ended.code in codes, ended.err
    found = {name: content for name, content in contents(tmp_path).items() if not name.startswith(".out.run")}
    assert leftovers(tmp_path) == []
    show(stage, fault, ended)
    if fault in ("occupied", "disk full", "nan"):
        assert without_training(found) == before and ended.err.count("\n") <= 1  # inspect prints its table
    elif fault == "file added":
        notes = "out/notes.txt" if mark else name
        assert found[notes] == b"mine" and (not mark or found[f"out/{mark}"] == b"old")
        assert (tmp_path / f"out-1{out.suffix}" / mark).exists()
    else:
        assert found[f"out/{mark}".rstrip("/") if mark else out.name] != b"old"
        assert ended.out.count("failed (ValueError: no picture)") <= 3
    if fault != "ornaments":
        succeed(*words(inputs), "--output", tmp_path / f"again{out.suffix}")


def show(stage: str, fault: str, ended: Done) -> None:
    """Print a row of the table stage x fault."""
    lines = (ended.err + ended.out).splitlines()
    line = next((line for line in lines if "not stored" in line or "failed (" in line), lines[0])
    print(f"{stage:10} | {fault:10} | {ended.code:2} | {line[:160]}")


# Stages that add to a folder, and what they add.
BENCHMARK = ["--batch_sizes", "1", "--dtypes", "fp32", "--runtimes", "eager", "--repeats", "5"]
ADDING: dict[str, tuple[Callable[[Inputs, Path], list[str | Path]], set[str]]] = {
    "benchmark": (lambda inputs, out: ["benchmark", out, *BENCHMARK], {"speed.json", "speed.png", "README.md"}),
    "evaluate": (
        lambda inputs, out: ["evaluate", out, "--data.dataset", str(inputs.images), "--data.batch_size", "4"],
        {"metrics.json", "config.json", "README.md"},
    ),
    "push": (lambda inputs, out: ["push", out, "--repo", "user/tiny"], set()),
}
# Fault -> exit codes of benchmark and evaluate, whose figures are printed, and of push, which saves a copy to check.
ADDING_CODES = {"occupied": (0, 73), "file added": (0, 0), "disk full": (0, 74), "ornaments": (0, 0)}
ADDING_ALWAYS = {("benchmark", "disk full"), ("evaluate", "file added"), ("push", "occupied")}


def idle(*_: object, **__: object) -> None:
    """Say that the machine is not busy, so that all figures are stored."""


@pytest.mark.parametrize(
    "stage, fault",
    [
        pytest.param(stage, fault, marks=() if (stage, fault) in ADDING_ALWAYS else pytest.mark.faults)
        for stage in ADDING
        for fault in ADDING_CODES
    ],
)
def test_fault_leaves_the_files_of_a_folder_together(
    stage: str, fault: str, inputs: Inputs, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(timing, "find_load", idle)
    (words, added), make = ADDING[stage], FAULTS[fault][0]
    out = shutil.copytree(inputs.pruned, tmp_path / "out")
    before = contents(out)
    with monkeypatch.context() as patch:
        if fault == "ornaments":
            patch.setattr(recording, "build_model_card", None)
        ended = make(out, patch, lambda: isoprune(*words(inputs, out)))
    show(stage, fault, ended)
    assert ended.code == ADDING_CODES[fault][stage == "push"], ended.err
    is_warned = "not stored" in ended.out + ended.err
    found = contents(out)
    changed = {name for name in {*found, *before} if found.get(name) != before.get(name)}
    assert leftovers(tmp_path) == []
    if fault == "ornaments":
        assert changed == added - {"README.md", "speed.png"}
    elif fault == "file added" and stage != "push":
        assert changed == {"notes.txt"} and is_warned
        assert {name for name, content in contents(tmp_path / "out-1").items() if content != before.get(name)} == added
    else:
        assert changed == set() and is_warned == (stage != "push")
    assert bool(hub.files.get("user/tiny")) == (stage == "push" and ended.code == 0)


def without_training(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """Leave out the states that `finetune` keeps in its output."""
    return {name: content for name, content in found.items() if not name.startswith("out/checkpoints")}


# Kills at random moments


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


def kill_at_random(command: list[str | Path], log: Path, check: Callable[[], bool]) -> tuple[int, int]:
    """Kill a command at random moments of its time, and check the state after each.

    Returns:
        Kills that hit a running process, and states in which `check` found the new result.
    """
    started = time.monotonic()
    assert Process(command, log).wait().code == 0
    seconds, met, new = time.monotonic() - started, 0, 0
    assert check()
    rng = random.Random(str(command[0]))
    for _ in range(10 * KILLS):
        process = Process(command, log)
        moment = time.monotonic() + rng.uniform(0, 1.1 * seconds)
        met += process.wait_for(lambda moment=moment: time.monotonic() > moment)
        process.send(signal.SIGKILL)
        assert process.wait().code in (0, -signal.SIGKILL), process.wait().err
        new += check()
        if met == KILLS:
            break
    return met, new


def is_replaced(out: Path, old: dict[str, bytes | None], copy: Path, names: set[str]) -> bool:
    """Return whether a folder is the new one; it must be the whole old one, which then comes back, or the new one."""
    found = contents(out)
    if found == old:
        return False
    assert {name for name in found if "checkpoints" not in name} == names
    shutil.rmtree(out)
    shutil.copytree(copy, out)
    return True


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["prune", "run", "frontier"])
def test_random_kills_leave_old_or_new(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    words = STAGES[stage].words(inputs)
    succeed(*words, "--prune.seed", "5", "--output", copy)
    names = {name for name in contents(copy) if "checkpoints" not in name}
    shutil.copytree(copy, out)
    old = contents(copy)
    command = [*words, "--overwrite", "true", "--output", out]
    met, new = kill_at_random(command, tmp_path / "log", lambda: is_replaced(out, old, copy, names))
    succeed(*command)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "copy", "log"} and leftovers(tmp_path) == []
    assert met == KILLS
    print(f"{stage}: {met} kills survived, {new} of the folders were new")


@pytest.mark.faults
def test_random_kills_of_benchmark_leave_old_or_new(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures and the card that shows them change together."""
    monkeypatch.setattr(timing, "find_load", idle)
    folder = shutil.copytree(inputs.pruned, tmp_path / "pruned")
    (folder / "speed.json").write_text("{}")
    old = contents(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    command = ["benchmark", folder, *BENCHMARK]

    def is_measured() -> bool:
        found = contents(folder)
        if found == old:
            return False
        assert {name for name in found if found[name] != old.get(name)} == {"speed.json", "speed.png", "README.md"}
        assert json.loads(found["speed.json"])["benchmark"]["rows"] and b"eager" in found["README.md"]
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        return True

    met, new = kill_at_random(command, tmp_path / "log", is_measured)
    succeed(*command)
    assert set(contents(folder)) == {*old, "speed.png"} and leftovers(tmp_path) == []
    print(f"benchmark: {met} kills survived, {new} of the folders had the figures")
    assert met == KILLS


@pytest.mark.faults
def test_random_kills_of_push_send_all_or_nothing(inputs: Inputs, hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(inputs.pruned, tmp_path / "pruned")
    old = contents(folder)
    command = ["push", folder, "--repo", "user/tiny"]

    def is_pushed() -> bool:
        assert contents(folder) == old
        files = hub.files.pop("user/tiny", {})
        sent = {name: content for name, content in old.items() if name != "README.md"}  # built for the repository
        assert not files or files.items() >= sent.items()
        hub.commits.clear()
        return bool(files)

    met, new = kill_at_random(command, tmp_path / "log", is_pushed)
    print(f"push: {met} kills survived, {new} of the pushes had arrived")
    assert met == KILLS
