"""Pictures with several shapes, one file each, and their labels in the layouts that users have."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List
from PIL import Image as PILImage
from PIL import ImageDraw

SHAPES = ("bar", "disc", "frame")
SIDE = 16

_DRAWN: dict[str, Callable[[ImageDraw.ImageDraw, int, int], None]] = {
    "bar": lambda pen, x, y: pen.rectangle((x, 1, x + 1, SIDE - 2), fill=200),
    "disc": lambda pen, x, y: pen.ellipse((x, y, x + 5, y + 5), fill=200),
    "frame": lambda pen, x, y: pen.rectangle((x, y, x + 5, y + 5), outline=200),
}


def draw_shapes(names: Sequence[str], seed: int) -> PILImage.Image:
    """Return a dark picture with one shape of each name, in a colour of its own and at a place from a seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 40, (SIDE, SIDE, 3), dtype=np.uint8)
    for name in names:
        shape = PILImage.new("L", (SIDE, SIDE))
        _DRAWN[name](ImageDraw.Draw(shape), *rng.integers(1, SIDE - 7, 2).tolist())
        pixels[..., SHAPES.index(name)] += np.asarray(shape)
    return PILImage.fromarray(pixels)


def draw_sets(images: int, seed: int = 0) -> list[list[str]]:
    """Return the names of the shapes of so many pictures; a part of them have none."""
    drawn = np.random.default_rng(seed).random((images, len(SHAPES))) < 0.4
    return [[name for name, is_drawn in zip(SHAPES, row, strict=True) if is_drawn] for row in drawn]


def write_pictures(folder: Path, sets: Sequence[Sequence[str]]) -> list[str]:
    """Write a picture for each set of shapes, and return the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{number:03d}.png" for number in range(len(sets))]
    for number, (file, names) in enumerate(zip(files, sets, strict=True)):
        draw_shapes(names, number).save(folder / file)
    return files


def write_metadata(folder: Path, files: Sequence[str], labels: Sequence[Sequence[str | int]]) -> None:
    """Write `metadata.jsonl`, with the lists of labels beside the names of the files."""
    rows = [{"file_name": file, "labels": [*found]} for file, found in zip(files, labels, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_shapes(root: Path, images: int = 40) -> Path:
    """Write a folder with train/ and validation/, each with pictures and `metadata.jsonl`."""
    for seed, split in enumerate(("train", "validation")):
        sets = draw_sets(images, seed)
        write_metadata(root / split, write_pictures(root / split, sets), sets)
    return root


def shape_rows(images: int, *, names: Sequence[str] = SHAPES, seed: int = 0) -> Dataset:
    """Return rows with lists of a ClassLabel."""
    sets = draw_sets(images, seed)
    features = Features({"image": Image(), "label": List(ClassLabel(names=[*names]))})
    pictures = [draw_shapes(found, number) for number, found in enumerate(sets)]
    return Dataset.from_dict({"image": pictures, "label": sets}, features=features)
