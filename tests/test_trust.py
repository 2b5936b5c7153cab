"""Untrusted files run no code, reach no other folder, and cannot exhaust the memory."""

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
# What the rules of ruff (pyproject.toml) do not know; they find eval, exec, pickle, marshal and unsafe YAML.
CALLS = {"compile", "__import__"}
READERS = {("torch", "load"), ("joblib", "load"), ("yaml", "full_load"), ("yaml", "unsafe_load")}


def reads_only_tensors(call: ast.Call) -> bool:
    """Return whether a call has the argument weights_only=True, with which torch.load runs nothing."""
    return any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)


def find_offences(path: Path) -> list[str]:
    """Return the lines of a module that run text or read objects that may run code."""
    found = []
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    safe = {node.func for node in nodes if isinstance(node, ast.Call) and reads_only_tensors(node)}
    for node in nodes:
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS
        read = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node not in safe
        read = read and (node.value.id, node.attr) in READERS
        pickled = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
        pickled = pickled and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        if called or read or pickled:
            found.append(f"{path.name}:{node.lineno}")
    return found


def test_no_module_runs_text_or_unpickles() -> None:
    assert [offence for path in SOURCES for offence in find_offences(path)] == []


def test_every_offence_is_found(tmp_path: Path) -> None:
    lines = ["compile('1')", "__import__('a')", "torch.load('x')", "yaml.full_load('x')", "f(allow_pickle=True)"]
    lines += ["torch.load('x', weights_only=False)", "load = torch.load"]
    fine = ["f(allow_pickle=False)", "torch.load('x', weights_only=True)"]
    (tmp_path / "bad.py").write_text("\n".join([*lines, *fine]), encoding="utf-8")
    assert sorted(find_offences(tmp_path / "bad.py")) == [f"bad.py:{number}" for number in range(1, 8)]


def test_shipped_code_is_that_of_the_package(pruned: Callable[[str], Pruned]) -> None:
    assert (pruned("vit").folder / "modeling_isoprune.py").read_bytes() == code_that_ships().encode()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors"])
def test_index_with_files_outside_is_refused(pruned: Callable[[str], Pruned], tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(pruned("vit").folder, tmp_path / "vit")
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match=re.escape(f"{name!r}: no such file")):
        IsoPruneForImageClassification.from_pretrained(folder)


def bomb(path: Path, width: int, height: int) -> Path:
    """Return a PNG of at most a few hundred kilobytes that decodes to width x height black pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_oversized_image_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bomb(tmp_path / "bomb.png", 8200, 8200)
    assert file.stat().st_size < 100_000
    image = Image.open(file)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"^image of 8200 x 8200 pixels: .* 67,108,864 "):
        IsoImageProcessor()(image, return_tensors="pt")


@pytest.mark.parametrize("size", [(60_000, 1), (1, 8_000)])
def test_image_too_long_is_refused_before_its_resize(size: tuple[int, int], tmp_path: Path) -> None:
    image = Image.open(bomb(tmp_path / "long.png", *size))
    with pytest.raises(ImageError, match=r"after the resize of its shorter side to 256: .* 67,108,864 "):
        IsoImageProcessor()(image, return_tensors="pt")


def test_large_photograph_is_accepted(tmp_path: Path) -> None:
    image = Image.open(bomb(tmp_path / "wide.png", 5000, 400))
    assert IsoImageProcessor()(image, return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)
