"""Decode image files into upright RGB images, and apply the policy for files that cannot be decoded.

`read_image` reads one row of a split; `read_or_replace` also applies the policy `data.broken`. The decoder `pil`
returns images of Pillow, the decoder `torchvision` returns their pixels as uint8 tensors of shape (3, H, W).
"""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from isoprune_hf.checkpoint.modeling_isoprune import check_pixels
from isoprune_hf.errors import DatasetError

Row = dict[str, Any]


class Rows(Protocol):
    """Rows with the columns `image` and `label`, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Row: ...


_GREY_IMAGE = Image.new("RGB", (224, 224), (128, 128, 128))
_ADVICE = "; fix or remove the file, or set data.broken: skip"
# Raised by Pillow for damaged files; `DecompressionBombError` is its limit on the number of pixels.
DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Decoding:
    """Settings for reading images.

    Args:
        broken: Policy for an image that cannot be read. `error` raises. `skip` uses the next readable image of the
            split instead, or leaves the image out of an evaluation. `grey` uses a grey image instead.
        max_broken: Number of unreadable images in an epoch or an evaluation above which an error is raised.
        exif: Turn images upright by their EXIF tag.
        decoder: `pil` returns images, `torchvision` returns tensors.
    """

    broken: Literal["error", "skip", "grey"] = "error"
    max_broken: int = 100
    exif: bool = True
    decoder: Literal["pil", "torchvision"] = "pil"


class LabelledImage(NamedTuple):
    """An RGB image, or its pixels of shape (3, H, W), with its label.

    Args:
        image: The image.
        label: Index of its class.
        is_replacement: The row itself could not be read, and this is the image that the policy uses instead.
    """

    image: Image.Image | Tensor
    label: int
    is_replacement: bool = False


def decode_image(encoded: bytes, *, exif: bool = True) -> Image.Image:
    """Decode an image file into RGB; of an animation, the first frame.

    Transparency is dropped. 16-bit grey is reduced to its upper 8 bits, as Pillow does with 16-bit colour; its own
    conversion of 16-bit grey would clip nearly all of it to white.

    Raises:
        OSError: The bytes are not an image, or only a part of one. Pillow's other errors are in `DECODE_ERRORS`.
        ImageError: The image has too many pixels; they are not decoded.
    """
    image = _open(encoded)
    image.load()
    if exif:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode_pixels(encoded: bytes, *, exif: bool = True) -> Tensor:
    """Decode an image file into the pixels of `decode_image`, of shape (3, H, W).

    torchvision decodes upright JPEG files in grey or RGB. Pillow decodes all other files, and the JPEG files that
    torchvision rejects.

    Raises:
        OSError: As `decode_image`.
    """
    image = _open(encoded)
    is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    if is_plain and not (exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1):
        content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        try:
            pixels: Tensor = decode_jpeg(content, mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # damaged: Pillow reads more of such files, and its errors are the ones reported
        else:
            return pixels
    return to_pixels(decode_image(encoded, exif=exif))


def to_pixels(image: Image.Image | Tensor) -> Tensor:
    """Return the pixels of an RGB image as uint8 of shape (3, H, W); return tensors unchanged."""
    if isinstance(image, Tensor):
        return image
    pixels: Tensor = functional.pil_to_tensor(image)
    return pixels


def _open(encoded: bytes) -> Image.Image:
    """Read the header of an image file, and raise if it has too many pixels."""
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:
        raise OSError("not an image of a known format" if encoded else "the file is empty") from error
    check_pixels(image)
    return image


def read_image(split: Rows, position: int, decoding: Decoding) -> LabelledImage:
    """Read one row of a split whose images are encoded.

    Raises:
        DatasetError: The image cannot be decoded; the message names its file if it has one.
    """
    where = f"image {position} of its split"
    try:
        row = split[position]
        image, label = row["image"], row["label"]
        if isinstance(image, Image.Image):
            return LabelledImage(_for_decoder(image.convert("RGB"), decoding), label)
        if image is None:
            raise OSError("the image is missing")
        where = image["path"] or where
        encoded = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        decode = decode_pixels if decoding.decoder == "torchvision" else decode_image
        return LabelledImage(decode(encoded, exif=decoding.exif), label)
    except DECODE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = (reason.splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"data: {where} cannot be read ({reason}){_ADVICE}") from error


def read_or_replace(split: Rows, position: int, decoding: Decoding, *, keep_label: bool = False) -> LabelledImage:
    """Read one row, or its replacement by the policy; the result depends on the position only.

    Args:
        split: Rows with encoded images.
        position: Position of the row.
        decoding: The policy and the decoder.
        keep_label: Never replace the row by another one: an evaluation counts each row by its own label, and drops
            the unreadable ones itself.

    Raises:
        DatasetError: The image cannot be read, and the policy is `error` or no replacement can be read either.
    """
    try:
        return read_image(split, position, decoding)
    except DatasetError:
        if decoding.broken == "error":
            raise
    if decoding.broken == "grey" or keep_label:
        return LabelledImage(_for_decoder(_GREY_IMAGE, decoding), split[position]["label"], is_replacement=True)
    for step in range(1, min(len(split), decoding.max_broken + 2)):
        try:
            found = read_image(split, (position + step) % len(split), decoding)
        except DatasetError:
            continue
        return found._replace(is_replacement=True)
    raise DatasetError(
        f"data: image {position} of its split cannot be read, and neither can the images after it; fix or remove the "
        "files"
    )


def _for_decoder(image: Image.Image, decoding: Decoding) -> Image.Image | Tensor:
    return to_pixels(image) if decoding.decoder == "torchvision" else image


def describe_broken(split: Rows, position: int, decoding: Decoding) -> str:
    """Return why the image of a row cannot be read, by reading it again."""
    try:
        read_image(split, position, decoding)
    except DatasetError as error:
        return str(error).removesuffix(_ADVICE).removeprefix("data: ")
    return f"image {position} of its split could not be read at first"


def check_broken(count: int, decoding: Decoding, place: str) -> None:
    """Raise a DatasetError if `count` unreadable images of `place` are more than the policy allows."""
    if count > decoding.max_broken:
        raise DatasetError(
            f"data: {count} images of {place} cannot be read, more than data.max_broken {decoding.max_broken}; fix or "
            "remove the files, or raise data.max_broken"
        )
