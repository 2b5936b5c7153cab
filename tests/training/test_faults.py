"""Trainings that are killed, stopped or short of resources, compared with an undisturbed one."""

import errno
import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from helpers.command_line import contents, isoprune, leftovers, refuse, succeed
from helpers.ranks import Ended, Process, run, start_ranks
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load, load_file

from isoprune_hf.data.augmentation import TransformedImages
from isoprune_hf.data.loading import ImageBatch
from isoprune_hf.training import log
from isoprune_hf.training.part_loss import PartLoss

MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
# An epoch of 48 images has six updates; stochastic depth, mixing and the moving average must continue as before.
SETTINGS = {"epochs": 3, "batch_size": 8, "learning_rate": 3e-3, "ema_decay": 0.9, "best": "ema", "state_every": 2}
SETTINGS |= {"mixup": 0.5, "drop_path": 0.2, "virtual_replicas": 2, "label_smoothing": 0.0, "evaluate_every": 2}
SETTINGS |= {"log_every": 1}


class Case(NamedTuple):
    """The inputs of all runs, and the results of undisturbed runs on one rank and on two."""

    root: Path
    command: list[str]
    alone: bytes
    paired: bytes
    log: list[dict[str, Any]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("faults")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 1)):
        for label in range(6):
            (root / "images" / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / f"class{label}" / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        # Pictures take a fifth of a run, and no test here reads them; they are written in the same way.
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b"picture"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        base = ["--prune.model", "timm/vit_tiny_patch16_224", "--prune.pretrained", "false", "--prune.num_labels", "6"]
        base += ["--prune.model_args", json.dumps(MODEL_ARGS), "--prune.criterion", "l1"]
        succeed("prune", *base, "--output", root / "pruned")
        command = ["finetune", "--model", str(root / "pruned"), "--data.dataset", str(root / "images")]
        command += [part for name, value in SETTINGS.items() for part in (f"--finetune.{name}", str(value))]
        ended = run([*command, "--output", root / "alone"], root / "log")
        assert ended.code == 0, ended.err
        ranks = start_ranks([*command, "--output", root / "paired"], root / "log")
        assert [rank.wait().code for rank in ranks] == [0, 0]
        yield Case(root, command, weights_of(root / "alone"), weights_of(root / "paired"), logged(root / "alone"))
        datasets.enable_progress_bars()


def weights_of(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def logged(output: Path) -> list[dict[str, Any]]:
    """Return the log without values that differ between runs."""
    changing = ("images_per_second", "data_wait", "tflops", "mfu")
    lines = (output / "checkpoints" / "training" / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in changing} for line in lines]


def states(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints" / "training").glob("[0-9]*"))


def finish(case: Case, output: Path) -> Ended:
    """Rerun the same command; its result must equal that of an undisturbed run byte for byte."""
    ended = run([*case.command, "--output", output], output.parent / "log")
    assert (ended.code, ended.err) == (0, "")
    assert weights_of(output) == case.alone and logged(output) == case.log
    assert leftovers(output.parent) == [] and states(output) == []
    return ended


@pytest.fixture(scope="module")
def stopped(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run that was killed with two snapshots; tests that change it copy it."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    process = Process([*case.command, "--output", output], output.parent / "log")
    assert process.wait_for(lambda: len(states(output)) == 2)
    process.send(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert not (output / "config.json").exists()
    return output


# Runs that are ended from outside


def kill_at_random(case: Case, output: Path, kills: int, seed: int, world: int = 1) -> int:
    """Kill and restart a run at random moments; return the number of kills that hit a running process."""
    rng, met = random.Random(seed), 0
    for number in range(kills):
        command, before = [*case.command, "--output", output], states(output)[-1:]
        processes = start_ranks(command, output.parent / "log", world)
        if number % 2 == 0:  # after the first snapshot of this start; otherwise at any time
            processes[0].wait_for(lambda before=before: states(output)[-1:] > before)
        moment = time.monotonic() + rng.uniform(0.0, 0.5 if number % 2 == 0 else 3.0)
        met += processes[0].wait_for(lambda moment=moment: time.monotonic() > moment)
        for process in processes:
            process.send(signal.SIGKILL)
        codes = [process.wait().code for process in processes]
        assert set(codes) <= {0, -signal.SIGKILL}, [process.wait().err for process in processes]
    return met


@pytest.mark.faults
def test_run_killed_at_random_resumes_byte_for_byte(case: Case, tmp_path: Path) -> None:
    assert kill_at_random(case, tmp_path / "out", kills=3, seed=0) >= 1
    finish(case, tmp_path / "out")


@pytest.mark.faults
@pytest.mark.parametrize("world", [1, 2])
def test_thirty_kills_lose_nothing(world: int, case: Case, tmp_path: Path) -> None:
    met, outputs = 0, 0
    while met < 30:
        output, outputs = tmp_path / str(outputs) / "out", outputs + 1
        met += kill_at_random(case, output, kills=4, seed=100 * world + outputs, world=world)
        if world == 1:
            finish(case, output)
        else:
            ranks = start_ranks([*case.command, "--output", output], tmp_path / "log")
            assert [rank.wait().code for rank in ranks] == [0, 0]
            assert weights_of(output) == case.paired
    print(f"{met} kills survived over {outputs} runs on {world} ranks")


def killed_before(call: int) -> Callable[[], None]:
    """Return a function that makes its process be killed before its n-th call of fsync, rename or replace."""

    def prepare() -> None:
        calls = 0

        def watch(name: str) -> None:
            function = getattr(os, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            setattr(os, name, counted)

        for name in ("fsync", "rename", "replace"):
            watch(name)

    return prepare


def check_kill_in_writing(case: Case, output: Path, call: int) -> bool:
    """Kill a run while it writes, and finish it; return False if it ended before that call."""
    ended = run([*case.command, "--output", output], output.parent / "log", before=killed_before(call))
    if ended.code == 0:
        return False
    assert ended.code == -signal.SIGKILL, ended.err
    finish(case, output)
    return True


# Within run.json, a snapshot, and the result's files; the full list is that of `make test-faults`.
@pytest.mark.kills
@pytest.mark.parametrize(
    "call", [pytest.param(2, marks=pytest.mark.faults), 23, pytest.param(-4, marks=pytest.mark.faults)]
)
def test_a_kill_within_writing_loses_nothing(call: int, case: Case, tmp_path: Path) -> None:
    if call < 0:  # from the end: count the calls of a whole run
        counted = tmp_path / "calls"

        def count() -> None:
            calls = killed_before(10**9)
            calls()
            fsync = os.fsync
            os.fsync = lambda file: (counted.open("a").write("x"), fsync(file))[1]
            for name in ("rename", "replace"):
                inner = getattr(os, name)
                setattr(os, name, lambda a, b, inner=inner: (counted.open("a").write("x"), inner(a, b))[1])

        assert run([*case.command, "--output", tmp_path / "first"], tmp_path / "log", before=count).code == 0
        call += len(counted.read_text())
    assert check_kill_in_writing(case, tmp_path / "out", call)


@pytest.mark.faults
def test_kill_before_any_write_loses_nothing(case: Case, tmp_path: Path) -> None:
    call = 1
    while check_kill_in_writing(case, tmp_path / f"out{call}", call):
        call += 3
    print(f"killed before {call // 3} calls of {call - 1}")
    assert call > 60


def stop(process: Process, output: Path, number: int, above: list[str]) -> Ended:
    """Send a signal when the run has written a snapshot newer than `above`."""
    assert process.wait_for(lambda: bool(states(output)) and states(output)[-1:] > above[-1:])
    process.send(number)
    return process.wait()


@pytest.mark.faults
def test_signals_stop_a_run_after_an_update(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number, code in ((signal.SIGUSR1, 75), (signal.SIGINT, 130), (signal.SIGTERM, 75)):
        before = states(out)
        ended = stop(Process([*case.command, "--output", out], tmp_path / "log"), out, number, before)
        assert ended.code == code
        pattern = rf"isoprune: stopped by {number.name}: update (\d) of 6 of epoch (\d) is saved; rerun.*\n"
        place = re.fullmatch(pattern, ended.err)
        assert place, ended.err
        assert states(out)[-1] == f"{int(place[2]):04d}-{int(place[1]):08d}"
        if before:
            epoch, update = before[-1].split("-")
            assert f"resuming after update {int(update)} of epoch {int(epoch)}" in ended.out
    finish(case, out)


@pytest.mark.faults
def test_signal_within_writing_of_log_loses_nothing(case: Case, tmp_path: Path) -> None:
    def dumps(entry: dict[str, Any]) -> str:
        if entry["epoch"] == 1 and "update" not in entry:
            signal.raise_signal(signal.SIGTERM)
        return json.dumps(entry)

    def prepare() -> None:  # in the process of the training
        log.json = SimpleNamespace(dumps=dumps, loads=json.loads)

    out = tmp_path / "out"
    assert run([*case.command, "--output", out], tmp_path / "log", before=prepare).code == 75
    finish(case, out)


@pytest.mark.faults
def test_run_is_saved_when_time_is_up(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run([*case.command, "--finetune.max_minutes", "0.003", "--output", out], tmp_path / "log")
    assert ended.code == 75
    assert re.fullmatch(r"isoprune: stopped by finetune\.max_minutes: .*; rerun the same command.*\n", ended.err)
    finish(case, out)


@pytest.mark.faults
def test_two_ranks_stop_together_and_resume_exactly(case: Case, tmp_path: Path) -> None:
    out, command = tmp_path / "out", [*case.command, "--output", tmp_path / "out"]
    ranks = start_ranks(command, tmp_path / "log")
    assert stop(ranks[1], out, signal.SIGTERM, []).code == 75
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [75, 75]
    assert "".join(end.err for end in ended).count("stopped by SIGTERM: update") == 1  # by the first rank that ends
    # The second time one rank is killed: the other one must not wait for it forever.
    ranks = start_ranks(command, tmp_path / "log")
    assert stop(ranks[1], out, signal.SIGKILL, states(out)).code == -signal.SIGKILL
    assert ranks[0].wait(60).code not in (0, None)
    ranks = start_ranks(command, tmp_path / "log")
    assert [rank.wait().code for rank in ranks] == [0, 0]
    assert weights_of(out) == case.paired


@pytest.mark.kills
def test_other_number_of_ranks_resumes_same_samples(case: Case, stopped: Path, tmp_path: Path) -> None:
    out = copy(stopped, tmp_path)
    ranks = start_ranks([*case.command, "--output", out], tmp_path / "log")
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert "the run was started on 1 ranks and resumes on 2: the same images in the same order" in ended[0].out
    torch.testing.assert_close(load(weights_of(out)), load(case.alone), atol=1e-5, rtol=1e-4)
    assert weights_of(out) != b""


def copy(output: Path, target: Path) -> Path:
    for name, content in contents(output).items():
        path = target / "out" / name
        path.mkdir(parents=True, exist_ok=True) if content is None else None
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return target / "out"


# Errors and warnings


CHANGED = {
    "learning rate": (["--finetune.learning_rate", "0.1"], "finetune.learning_rate was 0.003, got 0.1"),
    "split": (["--data.train_split", "validation"], "data.train_split was train, got validation"),
    "model": (["--model", "@root/alone"], "the model was "),
    "data set": (["--data.dataset", "@root/more"], "the data set was "),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_another_training_is_refused_by_name(kind: str, case: Case, stopped: Path, tmp_path: Path) -> None:
    if kind == "data set" and not (case.root / "more").exists():
        for path in (case.root / "images").glob("*/*/*.png"):
            target = case.root / "more" / path.relative_to(case.root / "images")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        (case.root / "more" / "train" / "class3" / "one_more.png").write_bytes(path.read_bytes())
    out, (flags, words) = copy(stopped, tmp_path), CHANGED[kind]
    before = {name: content for name, content in contents(out).items() if not name.endswith("lock")}
    line = refuse(*case.command, *[flag.replace("@root", str(case.root)) for flag in flags], "--output", out)
    assert words in line and "unfinished run with other settings" in line and "--overwrite true" in line
    assert {name: content for name, content in contents(out).items() if not name.endswith("lock")} == before


@pytest.mark.kills
def test_the_log_counts_the_operations_of_training(case: Case, tmp_path: Path) -> None:
    out, command = tmp_path / "out", [*case.command, "--finetune.peak_tflops", "0.5", "--output", tmp_path / "out"]
    ended = run([*command, "--finetune.log_every", "3"], tmp_path / "log")
    assert ended.code == 0 and "% of the peak, " in ended.out
    lines = (out / "checkpoints" / "training" / "log.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "update" in entry]
    # By hand from the shapes of the pruned weights: 16 patches, 17 tokens, both products of the attention.
    macs = 0
    for name, weight in load(weights_of(out)).items():
        if name.endswith("weight") and weight.ndim > 1:
            macs += (16 if "patch_embed" in name else 17 if "blocks" in name else 1) * weight.numel()
        if name.endswith("qkv.weight"):
            macs += 2 * 17 * 17 * (len(weight) // 3)
    for entry in entries:
        assert entry["tflops"] == pytest.approx(entry["images_per_second"] * 6 * macs / 1e12, rel=1e-6)
        assert entry["mfu"] == pytest.approx(entry["tflops"] / 0.5)


@pytest.mark.kills
def test_settings_that_change_no_weight_may_change(case: Case, stopped: Path, tmp_path: Path) -> None:
    out = copy(stopped, tmp_path)
    free = ["--finetune.state_every", "5", "--finetune.save_every", "1", "--data.num_workers", "1"]
    ended = run([*case.command, *free, "--data.batch_size", "3", "--output", out], tmp_path / "log")
    assert ended.code == 0 and "resuming after update" in ended.out
    assert weights_of(out) == case.alone


@pytest.mark.kills
def test_damaged_state_is_replaced_by_the_previous(case: Case, stopped: Path, tmp_path: Path) -> None:
    out = copy(stopped, tmp_path)
    older, newer = states(out)
    flip(out / "checkpoints" / "training" / newer / "tensors.safetensors")
    ended = finish(case, out)
    assert re.search(
        rf"training state \S+{newer}/tensors.safetensors: .*; continuing from {older}, the one before", ended.out
    )


def test_without_an_intact_state_nothing_begins_anew(case: Case, stopped: Path, tmp_path: Path) -> None:
    out = copy(stopped, tmp_path)
    for name in states(out):
        flip(out / "checkpoints" / "training" / name / "values.json")
    ended = isoprune(*case.command, "--output", out)
    assert ended.code == 65 and "none of the 2 training states" in ended.err and ended.err.count("\n") == 1
    assert len(states(out)) == 2
    ended = run([*case.command, "--overwrite", "true", "--output", out], tmp_path / "log")
    assert ended.code == 0 and "starting over, as --overwrite is set" in ended.out
    assert weights_of(out) == case.alone


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_finished_run_says_so_and_does_nothing(case: Case) -> None:
    before = contents(case.root / "alone")
    printed = succeed(*case.command, "--output", case.root / "alone")
    assert "contains the result of this run" in printed and "finetuned" in printed
    assert contents(case.root / "alone") == before
    line = refuse(*case.command, "--finetune.seed", "1", "--output", case.root / "alone")
    assert "exists and is not empty" in line and contents(case.root / "alone") == before


def test_second_run_in_a_folder_raises(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = Process([*case.command, "--output", out], tmp_path / "log")
    assert process.wait_for(lambda: bool(states(out)))
    os.kill(process.pid, signal.SIGSTOP)
    ended = isoprune(*case.command, "--output", out)
    os.kill(process.pid, signal.SIGCONT)
    assert ended.code == 73
    assert re.fullmatch(rf"isoprune: error: .*: process {process.pid} on \S+ is writing there\n", ended.err)
    assert process.wait().code == 0 and weights_of(out) == case.alone


# Failures inside the process


def limit_files(size: int) -> Callable[[], None]:
    """Return a function that makes writes beyond `size` bytes fail, as on a full disk."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


@pytest.mark.kills
def test_full_disk_loses_snapshots_only(case: Case, tmp_path: Path) -> None:
    files = [path for path in (case.root / "alone").iterdir() if path.is_file()]
    size = max(path.stat().st_size for path in files) + 2000  # every file of the result fits, a snapshot does not
    ended = run([*case.command, "--output", tmp_path / "out"], tmp_path / "log", before=limit_files(size))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("the training state 000") == 9 and "File too large" in ended.out
    assert weights_of(tmp_path / "out") == case.alone and leftovers(tmp_path) == []


@pytest.mark.kills
def test_unwritable_result_is_written_by_a_rerun(case: Case, stopped: Path, tmp_path: Path) -> None:
    out = copy(stopped, tmp_path)
    limit = limit_files(len(case.alone) // 2)
    ended = run([*case.command, "--output", out], tmp_path / "log", before=limit)
    assert ended.code == 74, ended.err
    assert re.fullmatch(r"isoprune: error: .*out cannot be written: .*; the training is saved.*\n", ended.err)
    assert not (out / "model.safetensors").exists() and len(states(out)) == 2
    finish(case, out)


def test_unwritable_folder_is_one_line_before_training(case: Case, tmp_path: Path) -> None:
    def prepare() -> None:
        def refuse_folder(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        os.mkdir = refuse_folder

    ended = run([*case.command, "--output", tmp_path / "out"], tmp_path / "log", before=prepare)
    assert ended.code == 73 and "epoch" not in ended.out
    assert re.fullmatch(r"isoprune: error: .* cannot be written \(Read-only file system\)\n", ended.err)


@pytest.mark.kills
def test_killed_loader_process_is_one_line_and_resumable(case: Case, tmp_path: Path) -> None:
    mark, parent = tmp_path / "killed", os.getpid()

    def prepare() -> None:
        load = TransformedImages.__getitem__

        def killed(self: TransformedImages, at: Any) -> Any:
            if self.seeds == (0, 2) and os.getppid() != parent and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return load(self, at)

        TransformedImages.__getitem__ = killed

    command = [*case.command, "--data.num_workers", "1", "--output", tmp_path / "out"]
    ended = run(command, tmp_path / "log", before=prepare)
    assert ended.code == 74, ended.err
    assert re.fullmatch(
        r"isoprune: error: data: a loader process ended .*; .* data.num_workers \(now 1\).*\n",
        ended.err,
    )
    assert states(tmp_path / "out")[-1] == "0001-00000006"
    finish(case, tmp_path / "out")


def test_diverging_training_leaves_only_finite_states(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = isoprune(*case.command, "--finetune.optimizer", "sgd", "--finetune.learning_rate", "1e4", "--output", out)
    assert ended.code == 70 and re.fullmatch(r"isoprune: error: finetune: the .* is (nan|inf) at .*\n", ended.err)
    for path in out.glob("checkpoints/training/[0-9]*/tensors.safetensors"):
        assert all(tensor.isfinite().all() for name, tensor in load_file(path).items() if name.startswith("model."))


def poison(rank: int, updates: set[int]) -> Callable[[], None]:
    """Return a function that makes the loss of one rank NaN in some updates of the second epoch."""

    def prepare() -> None:
        part_loss = PartLoss.__call__

        def poisoned(self: PartLoss, batch: ImageBatch, seeds: tuple[int, ...]) -> torch.Tensor:
            loss = part_loss(self, batch, seeds)
            is_meant = PartialState().process_index == rank and seeds[1] == 2 and seeds[2] in updates
            return loss * float("nan") if is_meant else loss

        PartLoss.__call__ = poisoned

    return prepare


@pytest.mark.kills
def test_nan_loss_on_one_rank_stops_all(case: Case, tmp_path: Path) -> None:
    out, command = tmp_path / "out", [*case.command, "--output", tmp_path / "out"]
    ended = [rank.wait() for rank in start_ranks(command, tmp_path / "log", before=poison(1, {3}))]
    assert [end.code for end in ended] == [70, 70]
    assert "".join(end.err for end in ended).count("finetune: the loss is nan at update 3 of epoch 2; lower") == 1
    assert states(out)[-1] == "0002-00000002"
    ranks = start_ranks(command, tmp_path / "log")
    assert [rank.wait().code for rank in ranks] == [0, 0] and weights_of(out) == case.paired


@pytest.mark.kills
def test_bad_steps_are_skipped_on_all_ranks(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*case.command, "--finetune.max_bad_steps", "2"]
    ranks = start_ranks([*command, "--output", out], tmp_path / "log", before=poison(1, {1, 2, 4}))
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert "the loss is nan at update 2 of epoch 2: the update is skipped (2 of 2 in a row)\n" in ended[0].out
    log = logged(out)
    faults = [(entry["epoch"], entry["update"]) for entry in log if "fault" in entry]
    assert faults == [(2, 2), (2, 3), (2, 5)]
    assert [entry["left_out"] for entry in log if "left_out" in entry] == [24]
    assert all(tensor.isfinite().all() for tensor in load(weights_of(out)).values())
    other = tmp_path / "other"
    ranks = start_ranks([*command, "--output", other], tmp_path / "log", before=poison(0, {1, 2, 3}))
    ended = [rank.wait() for rank in ranks]
    assert [end.code for end in ended] == [70, 70]
    assert "the loss is nan at update 3 of epoch 2, 3 times in a row" in "".join(end.err for end in ended)


@pytest.mark.kills
def test_hanging_rank_stops_the_others(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*case.command, "--finetune.rank_minutes", "0.05", "--output", out]
    ranks = start_ranks(command, tmp_path / "log")
    assert ranks[0].wait_for(lambda: len(states(out)) >= 1)
    ranks[1].send(signal.SIGSTOP)
    ended = ranks[0].wait(60)
    ranks[1].send(signal.SIGKILL)
    ranks[1].wait()
    assert ended.code == 74
    assert re.fullmatch(r"isoprune: error: a rank failed or did not answer .*\n", ended.err), ended.err
    ranks = start_ranks(command, tmp_path / "log")
    assert [rank.wait().code for rank in ranks] == [0, 0] and weights_of(out) == case.paired
