"""Every error becomes one line and an exit code; those that nobody expects leave a report."""

import contextlib
import errno
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import Done, isoprune

from isoprune_hf.cli.failures import classify, classify_lost_rank
from isoprune_hf.cli.main import main
from isoprune_hf.cli.table import STAGES
from isoprune_hf.commands.stage import Answer
from isoprune_hf.errors import DivergedError, Interrupted, RecipeError, WriteError

CODES = {
    "bad input": (RecipeError("prune.ratio must be between 0 and 1, got 2"), 2),
    "diverged": (DivergedError("the loss is nan"), 70),
    "not written": (WriteError("no space"), 74),
    "interrupted": (Interrupted("stopped"), 75),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory"), 71),
    "CPU memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 71),
    "Python memory": (MemoryError(), 71),
    "full disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.json"), 74),
}
SECRETS = {"HF_TOKEN": "hf_canary0123456789", "WANDB_API_KEY": "key-canary", "MY_SECRET": "secret-canary"}


def answer_by(monkeypatch: pytest.MonkeyPatch, answer: Answer | Exception) -> Done:
    """Run the command line with a stage that gives an answer or fails."""

    def run(**_: Any) -> Answer:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(STAGES, "inspect", replace(STAGES["inspect"], run=run, is_local=True))
    return isoprune("inspect", "--model", "any")


@pytest.mark.parametrize("kind", CODES)
def test_error_of_user_gets_its_exit_code(kind: str) -> None:
    error, code = CODES[kind]
    failure = classify(error)
    assert failure is not None and failure.code == code and classify_lost_rank(error) is None
    if code not in (71, 74):
        assert failure.message == str(error)


def test_failed_file_is_named_without_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    done = answer_by(monkeypatch, CODES["full disk"][0])
    assert done == Done(74, "", "isoprune: error: No space left on device: a.json\n")


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("a\nb"), RecursionError(), ExceptionGroup("e", [ValueError("v")])]
)
def test_unexpected_error_leaves_line_and_report(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    error.add_note(f"Authorization: {' '.join(SECRETS.values())}")
    done = answer_by(monkeypatch, error)
    (report,) = tmp_path.iterdir()
    assert done.code == 3 and done.out == ""
    assert re.fullmatch(rf"isoprune: error: unexpected {type(error).__name__}.*{report}.*\n", done.err)
    assert "isoprune_hf/cli/main.py:" in done.err
    text = report.read_text()
    assert "Traceback (most recent call last)" in text and "torch 2" in text and report.stat().st_mode & 0o077 == 0
    assert text.count("[secret]") == 3 and not any(secret in text for secret in SECRETS.values())


def test_unwritable_report_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    done = answer_by(monkeypatch, KeyError("x"))
    assert done.code == 3 and done.err.endswith("this is a bug: please report it\n")


def test_output_that_cannot_be_printed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "inspect", replace(STAGES["inspect"], run=lambda **_: Answer("text")))
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - closing it raises once more
    with contextlib.redirect_stdout(full), pytest.raises(SystemExit) as stopped:
        main(["inspect", "--model", "any"])
    assert stopped.value.code == 74
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.parametrize(("error", "code", "reports"), [("Broken pipe", 74, True), (None, 2, False)])
def test_survivor_without_store_names_lost_rank(
    error: str | None, code: int, reports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = answer_by(monkeypatch, RecipeError("bad") if error is None else RuntimeError(error))
    assert done.code == code and done.err.count("\n") == reports and ("a rank failed" in done.err) == reports


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), KeyError("x"), ValueError("y")])
def test_bug_is_not_a_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert classify(error) is None and classify_lost_rank(error) is None


@pytest.mark.parametrize("words", ["Connection closed by peer [127.0.0.1]", "Timed out waiting", "Broken pipe"])
def test_lost_rank_needs_more_than_one(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(f"{words}\nmore lines")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert classify_lost_rank(error) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    failure = classify_lost_rank(error)
    assert failure is not None and failure.code == 74
    assert "finetune.rank_minutes" in failure.message and failure.message.endswith(f"({words})")
