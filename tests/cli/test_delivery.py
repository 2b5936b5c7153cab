"""An answer is printed before its figures are stored, and stored even if nobody reads it."""

import pytest

from isoprune_hf.cli import main
from isoprune_hf.commands.stage import Answer


def test_figures_are_stored_after_they_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []
    answer = Answer("64 images", {"images": 64}, store=lambda: printed.append(capsys.readouterr().out))
    main._deliver(answer, as_json=False)
    main._deliver(answer, as_json=True)
    assert printed == ["64 images\n", '{\n  "images": 64\n}\n']
    main._deliver(Answer("nothing to store"), as_json=False)


def test_figures_without_reader_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError

    stored: list[bool] = []
    monkeypatch.setattr(main, "_print", fail)
    with pytest.raises(BrokenPipeError):
        main._deliver(Answer("text", store=lambda: stored.append(True)), as_json=False)
    assert stored == [True]
