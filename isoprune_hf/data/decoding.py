"""From the bytes of a file to an upright image in RGB, and what is done about files that are no such thing.

The decoder `pil` gives images of Pillow, the decoder `torchvision` their pixels as tensors (3, H, W) of 8 bits.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from isoprune_hf.checkpoint.modeling_isoprune import check_pixels
from isoprune_hf.errors import DatasetError

_GREY = Image.new("RGB", (224, 224), (128, 128, 128))
# What Pillow raises for damaged files; its limit on pixels (decompression bombs) among it.
DAMAGES = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError)
DAMAGES += (struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Decoding:
    """How images are read.

    Args:
        broken: What is done about one that cannot be read: error; skip takes the next readable one of the split in
            its place, or leaves it out of an evaluation; grey takes a grey one in its place.
        max_broken: More of them in an epoch or an evaluation are an error.
        exif: Turn images upright by their EXIF tag.
        decoder: pil gives images, torchvision tensors.
    """

    broken: Literal["error", "skip", "grey"] = "error"
    max_broken: int = 100
    exif: bool = True
    decoder: Literal["pil", "torchvision"] = "pil"


def decode_image(encoded: bytes, *, exif: bool = True) -> Image.Image:
    """Decode an image file into RGB; of an animation, the first frame.

    Transparency is dropped, and 16 bits of grey become their upper 8, as Pillow does with 16 bits of colour; its own
    conversion of such grey would clip nearly all of it to white.

    Raises:
        OSError: There is no image in it, or only a part of one; and the other errors of Pillow (`DAMAGES`).
        ImageError: It has too many pixels; they are not decoded.
    """
    image = _open(encoded)
    image.load()
    if exif:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode_pixels(encoded: bytes, *, exif: bool = True) -> Tensor:
    """Decode an image file into the pixels of `decode_image`, (3, H, W).

    torchvision decodes upright JPEGs in grey or RGB. All others, and what it finds damaged, are left to Pillow.

    Raises:
        OSError: As `decode_image`.
    """
    image = _open(encoded)
    is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    if is_plain and not (exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1):
        try:
            return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass
    return to_pixels(decode_image(encoded, exif=exif))


def to_pixels(image: Image.Image | Tensor) -> Tensor:
    """Give the pixels of an RGB image, (3, H, W) of 8 bits; pixels stay as they are."""
    return image if isinstance(image, Tensor) else functional.pil_to_tensor(image)


def _open(encoded: bytes) -> Image.Image:
    """Read the header of an image file, and refuse one of too many pixels."""
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:
        kind = "an image of a known format" if encoded else "anything"
        raise OSError(f"there is not {kind} in it") from error
    check_pixels(image)
    return image


def read_image(split: Sequence[dict[str, Any]], position: int, decoding: Decoding) -> tuple[Image.Image | Tensor, int]:
    """Read one row of a split whose images are encoded; returns the image in RGB, or its pixels, and its label.

    Raises:
        DatasetError: The image is damaged; names its file where it has one.
    """
    where = f"image {position} of its split"
    try:
        row = split[position]
        image, label = row["image"], row["label"]
        if isinstance(image, Image.Image):
            return _as_decoded(image.convert("RGB"), decoding), label
        if image is None:
            raise OSError("it is missing")
        where = image["path"] or where
        encoded = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        decode = decode_pixels if decoding.decoder == "torchvision" else decode_image
        return decode(encoded, exif=decoding.exif), label
    except DAMAGES as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = (reason.splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"data: {where} cannot be read ({reason}); mend it or take it out") from error


def read_or_replace(
    split: Sequence[dict[str, Any]], position: int, decoding: Decoding, *, is_counted: bool = False
) -> tuple[Image.Image | Tensor, int, bool]:
    """Read one row, or what the policy puts in its place: a function of the position alone.

    Args:
        split: Rows with encoded images.
        position: Of the row.
        decoding: Has the policy.
        is_counted: Each row counts as itself, as in an evaluation: no other one may take its place.

    Returns:
        The image in RGB or its pixels, its label, and whether the row itself could be read.

    Raises:
        DatasetError: It is damaged, and the policy is error, or so are all that could take its place.
    """
    try:
        return *read_image(split, position, decoding), True
    except DatasetError:
        if decoding.broken == "error":
            raise
    if decoding.broken == "grey" or is_counted:
        return _as_decoded(_GREY, decoding), split[position]["label"], False
    for step in range(1, min(len(split), decoding.max_broken + 2)):
        try:
            return *read_image(split, (position + step) % len(split), decoding), False
        except DatasetError:
            continue
    raise DatasetError(f"data: image {position} of its split cannot be read, and neither can those behind it")


def _as_decoded(image: Image.Image, decoding: Decoding) -> Image.Image | Tensor:
    return to_pixels(image) if decoding.decoder == "torchvision" else image


def describe_broken(split: Sequence[dict[str, Any]], position: int, decoding: Decoding) -> str:
    """Say what is wrong with a row by reading it again."""
    try:
        read_image(split, position, decoding)
    except DatasetError as error:
        return str(error).removesuffix("; mend it or take it out").removeprefix("data: ")
    return f"image {position} of its split could not be read at first"


def check_broken(count: int, decoding: Decoding, what: str) -> None:
    """Raise a DatasetError where more images than the policy allows could not be read."""
    if count > decoding.max_broken:
        raise DatasetError(
            f"data: {count} images of {what} cannot be read, more than data.max_broken {decoding.max_broken}; mend "
            "them, take them out, or allow more"
        )
