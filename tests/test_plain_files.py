"""Files that are no text, too large, nested too deeply, or never end."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isoprune_hf.checkpoint.folder import read_json as read_json_of_folder
from isoprune_hf.cli.recipe_files import read_recipe
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.limits import MAX_JSON_BYTES, MAX_NESTING
from isoprune_hf.models.identify import identify
from isoprune_hf.plain_files import parse_json, read_json, read_text
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.reporting.model_card import build_model_card

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "recipe": ("config.json", lambda folder: read_recipe(folder / "config.json")),
    "model": ("config.json", identify),
    "plan": ("pruning_plan.json", PruningPlan.load),
    "scores": ("scores.safetensors", lambda folder: ImportanceScores.load(folder / "scores.safetensors")),
    "metrics": ("metrics.json", lambda folder: read_json_of_folder(folder, "metrics.json")),
    "card": ("config.json", build_model_card),
}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(("depth", "is_read"), [(MAX_NESTING, True), (MAX_NESTING + 1, False), (10**5, False)])
def test_json_is_read_to_a_depth(depth: int, is_read: bool) -> None:
    if is_read:
        assert parse_json(nested(depth))
    else:
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            parse_json(nested(depth))


def test_mappings_count_as_depth() -> None:
    with pytest.raises(ValueError, match="nested"):
        parse_json('{"a":' * 65 + "1" + "}" * 65)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", ["nested", "large", "bytes", "pipe", "device", "folder"])
def test_every_reader_refuses_what_never_ends(content: str, reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    file = tmp_path / name
    if content == "pipe":
        os.mkfifo(file)
    elif content == "device":
        file.symlink_to("/dev/zero")
    elif content == "folder":
        file.mkdir()
    elif content == "large":
        with file.open("wb") as sparse:
            sparse.truncate(MAX_JSON_BYTES + 1)
    else:
        file.write_bytes(nested(10**5).encode() if content == "nested" else b"\xff\xfe{")
    if (reader, content) in {("metrics", "pipe"), ("metrics", "device"), ("metrics", "folder")}:
        assert read(tmp_path) is None  # there is no such file
        return
    with pytest.raises(IsoPruneError) as caught:
        read(tmp_path)
    assert isinstance(caught.value, CheckpointError | RecipeError) and "\n" not in str(caught.value)


def test_text_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("é" * 4)
    assert read_text(tmp_path / "a", 8) == "éééé"
    with pytest.raises(OSError, match="more than 7 bytes"):
        read_text(tmp_path / "a", 7)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b")


@pytest.mark.skipif(sys.platform != "linux", reason="files whose size is not known before they are read")
def test_file_of_unknown_size_is_read_whole() -> None:
    status = Path("/proc/self/status")
    assert status.stat().st_size == 0
    assert read_text(status).startswith("Name:") and read_text(status).endswith("\n")
