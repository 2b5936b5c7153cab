"""Intact and damaged image files, and folders and tar files of them."""

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.recipes import DataRecipe

ORIENTATION = 0x0112


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode=mode)


def with_orientation(image: Image.Image, value: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return encode(image, exif=exif)


def huge_png() -> bytes:
    """Return a PNG whose header declares 400 million pixels, with almost no data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BROKEN = {
    "a JPEG cut in its header": (encode(noise(), "JPEG")[:100], "."),
    "a JPEG cut in its scan": (encode(noise((64, 64)), "JPEG")[:-700], "truncated"),
    "zero bytes": (b"", "the file is empty"),
    "a page of text": (b"<html>404 Not Found</html>", "not an image of a known format"),
    "a PNG with a wrong checksum": (encode(noise()).replace(b"IHDR\x00", b"IHDR\x01", 1), "."),
    "too many pixels": (huge_png(), "exceeds limit"),
}


def write_images(root: Path, broken: dict[str, set[int]], images: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(images):
            folder = root / split / f"class{number * 3 // images}"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number:02d}.png"
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
            if number in broken.get(split, ()):
                path.write_bytes(path.read_bytes()[:60])
    return root


def open_images(root: Path, **changes: Any) -> ImageData:
    return load_data(DataRecipe(dataset=str(root), **changes))


def make_image(value: int) -> Image.Image:
    return Image.new("RGB", (6, 5), (value, value, value))


def write_tar(path: Path, images: dict[str, int], ending: str = "png", **others: bytes) -> None:
    """Write a shard: an image and its class for each key, and further members for the first key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))

        for number, (key, label) in enumerate(images.items()):
            stream = io.BytesIO()
            make_image(10 * label + number).save(stream, "PNG")
            add(f"{key}.{ending}", stream.getvalue())
            add(f"{key}.cls", str(label).encode())
            for name, content in others.items():
                add(f"{key}.{name}", content)
