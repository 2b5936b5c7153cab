"""Damaged and hostile old checkpoints: each raises an IsoPruneError or is converted, and nothing in it runs."""

import pickletools
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from helpers.fuzzing import FEW, INPUTS, LIMITS, counts, damage_bytes, guarded, watched
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from isoprune_hf.errors import IsoPruneError
from isoprune_hf.legacy.convert import convert_file

__all__ = ["watched"]
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4], "stem_width": 4}
TOKENS = [
    *(operation.code.encode("latin-1") for operation in pickletools.opcodes),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch.nn\nModule\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"X\x08\x00\x00\x00_modules", b"X\x0b\x00\x00\x00_parameters", b"\x8a\xff" + b"\xff" * 255, b"h\x00", b"q\x00"),
    *(b"M\xff\xff", b"J\xff\xff\xff\x7f", b"G\x7f\xf8" + b"\x00" * 6, b"K\x00", b"X\xff\xff\xff\xff"),
]
ZIP_TOKENS = [b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\xff" * 4]


def try_pickles(folder: Path, inputs: int) -> None:
    """Convert damaged copies of one checkpoint, damaged in its pickle or in the zip file."""
    whole = folder / "whole.pth"
    torch.save(timm.create_model("resnet18", num_classes=3, **RESNET), whole)
    with zipfile.ZipFile(whole) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    zipped = whole.read_bytes()
    file = folder / "damaged.pth"

    @seed(6)
    @settings(LIMITS, max_examples=inputs)
    @given(st.data())
    def attempt(drawn: st.DataObject) -> None:
        if drawn.draw(st.integers(0, 3)):
            code = damage_bytes(drawn.draw, entries[name], TOKENS)
            with zipfile.ZipFile(file, "w") as archive:
                for entry, content in {**entries, name: code}.items():
                    archive.writestr(entry, content)
        else:
            file.write_bytes(damage_bytes(drawn.draw, zipped, ZIP_TOKENS))
        with guarded("pickle", folder):
            try:
                converted = convert_file(file, base="timm/resnet18", model_args=RESNET)
            except IsoPruneError as error:
                counts["pickle refused"] += 1
                assert str(error).startswith("convert: ") and "\n" not in str(error)
                return
        counts["pickle converted"] += 1
        model = converted.model
        assert model.model.fc.weight.shape[0] == model.config.num_labels

    attempt()


def test_few_damaged_pickles_are_refused_or_converted(tmp_path: Path) -> None:
    try_pickles(tmp_path, FEW)


@pytest.mark.fuzz
@pytest.mark.usefixtures("watched")
def test_damaged_pickle_is_refused_or_converted(tmp_path: Path) -> None:
    try_pickles(tmp_path, INPUTS // 2)
