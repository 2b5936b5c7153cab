"""`run` that ends before its result is written: the same command continues it, and the old result stays till then."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from helpers.command_line import contents, isoprune, leftovers, refuse, succeed
from helpers.marks import one_of_each
from helpers.ranks import Process, write_slowly
from helpers.stage_commands import run_command, write_four_classes
from matplotlib.figure import Figure

from isoprune_hf.commands.steps import pipeline
from isoprune_hf.errors import CheckpointError
from isoprune_hf.measuring.timing import Passes, Timing
from isoprune_hf.pruning import score as scoring
from isoprune_hf.training import run as training_run


class Case(NamedTuple):
    """Images, the command, and the files of an undisturbed run whose bytes are always the same."""

    images: Path
    command: list[str]
    expected: dict[str, bytes]


def fixed_files(out: Path) -> dict[str, bytes]:
    """Return the weights, plans and figures of a run; all else has measured times."""
    names = ["model/model.safetensors", "model/pruning_plan.json", "model/metrics.json", "importance.safetensors"]
    names += ["checkpoints/last/model.safetensors", "base/model.safetensors"]
    return {name: (out / name).read_bytes() for name in names if (out / name).exists()}


def one_millisecond(models: dict[str, Any], *arguments: Any, **settings: Any) -> Timing:
    return Timing(dict.fromkeys(models, Passes((1.0,), (1.0,))), busy=None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(pipeline, "time_models", one_millisecond)
        # Pictures take a fifth of a run, and no test here reads them.
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b"picture"))
        datasets.disable_progress_bars()
        yield write_four_classes(root / "images")
        datasets.enable_progress_bars()


def make_case(images: Path, out: Path, *, pretrain: bool) -> Case:
    command = run_command(images, pretrain=pretrain)
    succeed(*command, "--output", out)
    return Case(images, command, fixed_files(out))


@pytest.fixture(scope="module")
def case(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(images, tmp_path_factory.mktemp("plain") / "out", pretrain=False)


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The case of a base that is trained first."""
    return make_case(images, tmp_path_factory.mktemp("pretrained") / "out", pretrain=True)


class Stopped(BaseException):
    """Ends a run as a kill does, at a place that a test has chosen."""


def stop_at(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `run` end before one of its steps."""

    def stop(*arguments: object, **options: object) -> None:
        raise Stopped(place)

    monkeypatch.setattr(pipeline, place, stop)


# Each step of a run, in order: before it, the one before is complete.
STEPS = ["cut_and_evaluate", "save_model_folder", "forget_scoring", "open_teacher", "_measure", "finish"]


@pytest.mark.kills
@pytest.mark.parametrize("step", one_of_each(STEPS, *STEPS[:2], "_measure", mark="faults"))
def test_run_continues_where_it_ended(
    step: str, pretrained: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, out = pretrained, tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Stopped):
            isoprune(*case.command, "--output", out)
    assert not out.exists()
    scorings: list[object] = []
    score = scoring.score_groups

    def count(*arguments: object, **options: object) -> object:
        scorings.append(arguments)
        return score(*arguments, **options)

    monkeypatch.setattr(scoring, "score_groups", count)
    succeed(*case.command, "--output", out)
    assert fixed_files(out) == case.expected
    assert len(scorings) == (1 if step in STEPS[:2] else 0)
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and leftovers(tmp_path) == []


@pytest.mark.kills
def test_old_result_stays_until_the_new_is_complete(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "config.json").write_text("old")
    command = [*case.command, "--overwrite", "true", "--output", out]
    with monkeypatch.context() as patch:
        stop_at("finish", patch)
        with pytest.raises(Stopped):
            isoprune(*command)
    assert contents(out) == {"model": None, "model/config.json": b"old"}
    succeed(*command)
    assert fixed_files(out) == case.expected
    assert {path.name for path in out.iterdir()} == {"model", "checkpoints", "importance.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.kills
def test_other_settings_need_overwrite(pretrained: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, out = pretrained, tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at("_measure", patch)
        with pytest.raises(Stopped):
            isoprune(*case.command, "--output", out)
    before = contents(tmp_path)
    for flag in ("--prune.seed", "--pretrain.seed", "--finetune.seed"):
        line = refuse(*case.command, flag, "1", "--output", out)
        assert f"{flag[2:]} was 0, got 1" in line and str(out) in line
    assert contents(tmp_path) == before
    succeed(*case.command, "--finetune.seed", "1", "--overwrite", "true", "--output", out)
    found = fixed_files(out)
    assert found["base/model.safetensors"] == case.expected["base/model.safetensors"]
    assert found["model/model.safetensors"] != case.expected["model/model.safetensors"]


def test_failure_before_any_work_leaves_nothing(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr(pipeline, "cut_and_evaluate", fail)
    refuse(*run_command(case.images), "--output", tmp_path / "deep" / "out")
    assert contents(tmp_path) == {}


def slowly() -> None:
    """Make a training wait after each state that it saves, so that a signal can follow."""
    write_slowly(training_run, 0.1)


def states(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.glob(f".{out.name}.run/*/checkpoints/training/[0-9]*"))


@pytest.mark.kills
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_saves_a_state_that_continues(number: int, code: int, case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = Process([*case.command, "--output", out], tmp_path / "log", slowly)
    assert process.wait_for(lambda: bool(states(out)))
    process.send(number)
    ended = process.wait()
    assert ended.code == code and "is saved; rerun the same command to resume" in ended.err
    assert not out.exists()
    succeed(*case.command, "--output", out)
    assert fixed_files(out) == case.expected
