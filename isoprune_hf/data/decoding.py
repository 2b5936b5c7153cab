"""Decode image files into upright images, and apply the policy for files that cannot be decoded.

`read_image` reads one row of a split; `read_or_replace` also applies the policy `data.broken`. The decoder `pil`
returns images of Pillow in grey or RGB, the decoder `torchvision` returns their pixels as uint8 tensors of shape
(C, H, W). Images of any other number of channels are such tensors for both decoders.
"""

import io
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.image_processor import (
    channels_first,
    channels_of,
    check_pixels,
    convert_image,
    shorter_edge,
)
from isoprune_hf.errors import DatasetError, ImageError
from isoprune_hf.limits import MAX_IMAGE_BYTES
from isoprune_hf.plain_files import read_bytes

Row = dict[str, Any]


class Rows(Protocol):
    """Rows with the columns `image` and `label`, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Row: ...


PILLOW_CHANNELS = (1, 3)  # whose images are images of Pillow until they are pixel values
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
        channels: Number of channels of the images that the model reads.
        edge: Length to which the shorter side of an image is resized; None for a resize of both sides.
    """

    broken: Literal["error", "skip", "grey"] = "error"
    max_broken: int = 100
    exif: bool = True
    decoder: Literal["pil", "torchvision"] = "pil"
    channels: int = 3
    edge: int | None = None

    def for_processor(self, processor: BaseImageProcessor) -> "Decoding":
        """Return the settings for images of the channels that a processor takes, and for its resize."""
        return replace(self, channels=channels_of(processor), edge=shorter_edge(processor))

    @property
    def makes_tensors(self) -> bool:
        """Return whether images are uint8 tensors of shape (C, H, W), not images of Pillow."""
        return self.decoder == "torchvision" or self.channels not in PILLOW_CHANNELS


class UnreadableImageError(DatasetError):
    """Raised when an image is missing or damaged: the policy `data.broken` decides what follows."""


class LabelledImage(NamedTuple):
    """An image, or its pixels of shape (C, H, W), with its label.

    Args:
        image: The image.
        label: Index of its class, or the list of its classes.
        is_replacement: The row itself could not be read, and this is the image that the policy uses instead.
    """

    image: Image.Image | Tensor
    label: Any
    is_replacement: bool = False


def decode_image(encoded: bytes, *, exif: bool = True, channels: int = 3) -> Image.Image:
    """Decode an image file into grey (1 channel), RGB (3) or RGBA (4); of an animation, the first frame.

    Transparency is dropped, except by RGBA. Grey of more than 8 bits is clipped to 255: so do the loaders of
    torchvision and timm, and pipelines, before a processor sees the image.

    Raises:
        OSError: The bytes are not an image, or only a part of one. Pillow's other errors are in `DECODE_ERRORS`.
        ImageError: The image has too many pixels and is not decoded, or it has no such channels.
    """
    return convert_image(_decode(_open(encoded), exif=exif), channels)


def decode_pixels(encoded: bytes, *, exif: bool = True, channels: int = 3) -> Tensor:
    """Decode an image file into the pixels of `decode_image`, of shape (C, H, W).

    torchvision decodes upright JPEG files in grey or RGB. Pillow decodes all other files, colour files for models of
    grey images, and the JPEG files that torchvision rejects.

    Raises:
        OSError: As `decode_image`.
        ImageError: As `decode_image`.
    """
    image = _open(encoded)
    pixels = _decode_jpeg(image, encoded, exif=exif, channels=channels)
    return to_pixels(convert_image(_decode(image, exif=exif), channels)) if pixels is None else pixels


def to_pixels(image: Image.Image | Tensor) -> Tensor:
    """Return the pixels of an image as uint8 of shape (C, H, W); return tensors unchanged."""
    if isinstance(image, Tensor):
        return image
    pixels: Tensor = functional.pil_to_tensor(image)
    return pixels


def grey_image(decoding: Decoding, side: int = 224) -> Image.Image | Tensor:
    """Return a grey square as the settings read images."""
    if decoding.makes_tensors:
        return torch.full((decoding.channels, side, side), 128, dtype=torch.uint8)
    return convert_image(Image.new("L", (side, side), 128), decoding.channels)


def _open(encoded: bytes, edge: int | None = None) -> Image.Image:
    """Read the header of an image file, and raise if it has too many pixels; `edge` as in `check_pixels`."""
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:
        raise OSError("not an image of a known format" if encoded else "the file is empty") from error
    check_pixels(*image.size, edge)
    return image


def _decode(image: Image.Image, *, exif: bool) -> Image.Image:
    """Decode an opened file into an upright image."""
    image.load()
    if exif:
        image = ImageOps.exif_transpose(image)
    return image


def _decode_jpeg(image: Image.Image, encoded: bytes, *, exif: bool, channels: int) -> Tensor | None:
    """Decode a file by torchvision; return None if that cannot give the pixels of Pillow."""
    if image.format != "JPEG" or (channels, image.mode) not in ((3, "RGB"), (3, "L"), (1, "L")):
        return None
    if exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    try:
        pixels: Tensor = decode_jpeg(content, mode=ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY)
    except RuntimeError:
        return None  # damaged: Pillow reads more of such files, and its errors are the ones reported
    return pixels


def read_image(split: Rows, position: int, decoding: Decoding) -> LabelledImage:
    """Read one row of a split whose images are encoded, images of Pillow, or arrays of uint8.

    Raises:
        UnreadableImageError: The image is missing or damaged; the message names its file if it has one.
        DatasetError: The image does not have the channels that the model reads.
    """
    where = f"image {position} of its split"
    try:
        row = split[position]
        image, label = row["image"], row["label"]
        if image is None:
            raise OSError("the image is missing")
        if isinstance(image, dict):
            where = image["path"] or where
            encoded = read_bytes(image["path"], MAX_IMAGE_BYTES) if image["bytes"] is None else image["bytes"]
            image = _read_file(encoded, decoding)
            if isinstance(image, Tensor):
                return LabelledImage(image, label)
        elif isinstance(image, Image.Image):
            check_pixels(*image.size, decoding.edge)
            image.load()
    except DECODE_ERRORS as error:
        raise _unreadable(where, error) from error
    try:
        return LabelledImage(_fit(image, decoding), label)
    except ImageError as error:
        raise DatasetError(f"data: {where}: {error}") from error
    except DECODE_ERRORS as error:  # a mode that Pillow does not convert
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> UnreadableImageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = (reason.splitlines() or [type(error).__name__])[0]
    return UnreadableImageError(f"data: {where} cannot be read ({reason}){_ADVICE}")


def _read_file(encoded: bytes, decoding: Decoding) -> Image.Image | Tensor:
    """Decode a file into an image in the mode of the file, or into the pixels that the model reads."""
    image, pixels = _open(encoded, decoding.edge), None
    if decoding.decoder == "torchvision":
        pixels = _decode_jpeg(image, encoded, exif=decoding.exif, channels=decoding.channels)
    return _decode(image, exif=decoding.exif) if pixels is None else pixels


def _fit(image: Any, decoding: Decoding) -> Image.Image | Tensor:
    """Return an image with the channels that the model reads, as the decoder returns it.

    Raises:
        ImageError: The image does not have these channels, or is an array of another type than uint8.
    """
    if isinstance(image, Image.Image):
        fitted = convert_image(image, decoding.channels)
        return to_pixels(fitted) if decoding.makes_tensors else fitted
    array = np.asarray(image, np.uint8 if isinstance(image, list) else None)  # rows of a stream are lists
    if array.dtype != np.uint8:
        raise ImageError(f"the image is an array of {array.dtype}, needs uint8 with values from 0 to 255")
    array = channels_first(array, decoding.channels)
    check_pixels(array.shape[2], array.shape[1], decoding.edge)
    if decoding.makes_tensors:
        return torch.from_numpy(array.copy())
    return Image.fromarray(array[0] if decoding.channels == 1 else np.moveaxis(array, 0, -1).copy())


def read_or_replace(split: Rows, position: int, decoding: Decoding, *, keep_label: bool = False) -> LabelledImage:
    """Read one row, or its replacement by the policy; the result depends on the position only.

    Args:
        split: Rows with encoded images.
        position: Position of the row.
        decoding: The policy and the decoder.
        keep_label: Never replace the row by another one: an evaluation counts each row by its own label, and drops
            the unreadable ones itself.

    Raises:
        DatasetError: The image cannot be read, and the policy is `error` or no replacement can be read either; or it
            does not have the channels that the model reads.
    """
    try:
        return read_image(split, position, decoding)
    except UnreadableImageError:
        if decoding.broken == "error":
            raise
    if decoding.broken == "grey" or keep_label:
        return LabelledImage(grey_image(decoding), split[position]["label"], is_replacement=True)
    for step in range(1, min(len(split), decoding.max_broken + 2)):
        try:
            found = read_image(split, (position + step) % len(split), decoding)
        except UnreadableImageError:
            continue
        return found._replace(is_replacement=True)
    raise DatasetError(
        f"data: image {position} of its split cannot be read, and neither can the images after it; fix or remove the "
        "files"
    )


def describe_broken(split: Rows, position: int, decoding: Decoding) -> str:
    """Return why the image of a row cannot be read, by reading it again."""
    try:
        read_image(split, position, decoding)
    except UnreadableImageError as error:
        return str(error).removesuffix(_ADVICE).removeprefix("data: ")
    return f"image {position} of its split could not be read at first"


def check_broken(count: int, decoding: Decoding, place: str) -> None:
    """Raise a DatasetError if `count` unreadable images of `place` are more than the policy allows."""
    if count > decoding.max_broken:
        raise DatasetError(
            f"data: {count} images of {place} cannot be read, more than data.max_broken {decoding.max_broken}; fix or "
            "remove the files, or raise data.max_broken"
        )
