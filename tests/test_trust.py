"""What strangers send is not believed: no code runs, no name leaves its folder, no image fills the memory."""

import ast
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.pruned_models import Pruned
from PIL import Image

from isoprune_hf import IsoImageProcessor
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, code_that_ships
from isoprune_hf.errors import CheckpointError, ImageError

ROOT = Path(__file__).parents[1]
SOURCES = [
    *sorted((ROOT / "isoprune_hf").rglob("*.py")),
    *ROOT.glob("*.py"),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
READS_CODE = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("yaml", "load"), ("yaml", "unsafe_load")}
READS_CODE |= {("yaml", "full_load"), ("marshal", "loads"), ("dill", "load"), ("joblib", "load"), ("os", "system")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_text_or_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in RUNS_CODE, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in READS_CODE, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"} & set(names), path.name
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, path.name


def test_that_test_finds_what_it_looks_for(tmp_path: Path) -> None:
    for text in ("eval('1')", "import pickle", "torch.load('x')", "yaml.load('x')", "f(allow_pickle=True)"):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(AssertionError):
            test_nothing_runs_text_or_unpickles(tmp_path / "bad.py")


def test_the_code_beside_the_weights_is_that_of_the_package(pruned: Callable[[str], Pruned]) -> None:
    assert (pruned("vit").folder / "modeling_isoprune.py").read_bytes() == code_that_ships().encode()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(
    pruned: Callable[[str], Pruned], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(pruned("vit").folder, tmp_path / "vit")
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match=re.escape(f"{name!r}: no such file")):
        IsoPruneForImageClassification.from_pretrained(folder)


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of some hundred kilobytes at most that stands for width x height black pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bomb(tmp_path / "bomb.png", 8200, 8200)
    assert file.stat().st_size < 100_000
    image = Image.open(file)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"^image of 8200 x 8200 pixels: .* 67,108,864 "):
        IsoImageProcessor()(image, return_tensors="pt")


def test_a_large_photograph_is_not_refused(tmp_path: Path) -> None:
    image = Image.open(bomb(tmp_path / "wide.png", 5000, 400))
    assert IsoImageProcessor()(image, return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)
