"""Errors become one line and an exit code; bugs do not."""

import pytest
import torch

from isoprune_hf.cli.failures import classify, classify_lost_rank
from isoprune_hf.errors import DivergedError, Interrupted, RecipeError, WriteError

CODES = {
    "bad input": (RecipeError("prune.ratio must be between 0 and 1, got 2"), 2),
    "diverged": (DivergedError("the loss is nan"), 70),
    "not written": (WriteError("no space"), 74),
    "interrupted": (Interrupted("stopped"), 75),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory"), 71),
    "CPU memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 71),
    "Python memory": (MemoryError(), 71),
}


@pytest.mark.parametrize("kind", CODES)
def test_error_of_user_gets_its_exit_code(kind: str) -> None:
    error, code = CODES[kind]
    failure = classify(error)
    assert failure is not None and failure.code == code and classify_lost_rank(error) is None
    if code != 71:
        assert failure.message == str(error)


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
