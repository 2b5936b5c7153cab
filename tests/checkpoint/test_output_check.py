"""Places of results are checked before any work."""

import os
from pathlib import Path

import pytest

from isoprune_hf.checkpoint.output_check import check_output
from isoprune_hf.errors import RecipeError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("is_file", [True, False])
def test_new_output_is_accepted_without_creating_it(is_file: bool, tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "b", overwrite=False, is_file=is_file) == tmp_path / "a" / "b"
    assert names(tmp_path) == set()


def test_empty_folder_is_accepted(tmp_path: Path) -> None:
    assert check_output(str(tmp_path), overwrite=False) == tmp_path


@pytest.mark.parametrize("is_file", [True, False])
def test_existing_result_needs_overwrite(is_file: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    output = tmp_path / "config.json" if is_file else tmp_path
    with pytest.raises(RecipeError) as caught:
        check_output(output, overwrite=False, is_file=is_file)
    message = str(caught.value)
    assert message.startswith(f"--output {output} exists") and "--overwrite true" in message and "\n" not in message
    assert check_output(output, overwrite=True, is_file=is_file) == output
    assert names(tmp_path) == {"config.json"}


@pytest.mark.parametrize("place", ["", "model", "base", "checkpoints/last"])
def test_folder_with_a_model_may_be_replaced(place: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "config.json").write_text("{}")
    assert check_output(tmp_path, overwrite=True) == tmp_path


@pytest.mark.parametrize("overwrite", [True, False])
def test_folder_of_other_files_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match=f"^--output {tmp_path} "):
        check_output(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [True, False])
def test_file_and_folder_are_not_interchangeable(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match=f"^--output {tmp_path}/file is a file"):
        check_output(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(RecipeError, match=f"^--output {tmp_path} is a folder"):
        check_output(tmp_path, overwrite=overwrite, is_file=True)


@pytest.mark.parametrize("is_file", [True, False])
def test_output_below_a_file_is_refused(is_file: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match=f"^--output {tmp_path}/file/out: {tmp_path}/file "):
        check_output(tmp_path / "file" / "out", overwrite=False, is_file=is_file)


@pytest.mark.parametrize("is_file", [True, False])
def test_output_in_readonly_folder_is_refused(is_file: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RecipeError, match=f"^--output {tmp_path}/a/b: {tmp_path} "):
        check_output(tmp_path / "a" / "b", overwrite=False, is_file=is_file)


def test_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(RecipeError):
        check_output(tmp_path, overwrite=False)


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_what_is_no_file_is_never_replaced(kind: str, is_file: bool, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/null" if kind == "device" else "place")
    with pytest.raises(RecipeError, match=f"^--output {place} "):
        check_output(place, overwrite=True, is_file=is_file)
    assert names(tmp_path) == {"place"}
