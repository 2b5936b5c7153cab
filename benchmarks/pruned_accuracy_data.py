"""Draw the images of `pruned_accuracy.py`: glyphs of the fonts that matplotlib ships, and scikit-learn's digits.

`glyphs` are 61 classes of 16x16 pixels, `letters` 200 classes of 64x64.

Every image is drawn from a seed. The splits have separate seeds: `SELECTION` and `REPORT` are fixed images, and
`stream_seed` returns seeds of training images, which are in neither split.
"""

import math
from functools import cache
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch.nn import functional

ALPHABETS = {
    "glyphs": "ABCDEFGHIJKLMNPQRSTUVWXYZ" + "0123456789" + "&@#%$?+=<>" + "ΔΘΛΞΠΣΦΨΩβγδλμπω",
    "letters": "!#$%&()*+,/0123456789;<=>?@ABCDEFGHJKLMNOPQRSTUVWXYZ[]^_abcdefghijkmn"
    "opqrstuvwxyz{|}~¢£¤¥§©ª«¬®±²µ¶»¼½¾¿ÀÆÇÈÌÑÒØÙÝÞßàäåæçèëïðñò÷ùýþÿΔΞ"
    "ΠΣΦΨΩάέήίΰαβγδεζηικλνξπςσυφχψωГДЖИЙЛФЦЧШЩЪЫЬЭЮЯбвджзйлмнфцчшщъыьюя",
}
FACES = (
    *("DejaVuSans" + style for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *("DejaVuSansMono" + style for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *("DejaVuSerif" + style for style in ("", "-Bold", "-Italic", "-BoldItalic")),
)
SIDES = {"glyphs": 16, "digits": 16, "letters": 64}
FACTOR = 2  # masks are warped at twice the size and averaged
SELECTION, REPORT = 1, 2  # seeds of the splits, below those of the streams
TEST_IMAGES = 2000
NOISE = 0.15  # standard deviation, for pixels from 0 to 1
MAX_TURN = math.radians(10)
MAX_CHANGE = 0.1  # of size, shear and position
MIN_CONTRAST = 0.7
DIGIT_SPLITS = (1097, 300)  # images for training and selection; the other 400 are the report split


def stream_seed(purpose: str, seed: int) -> int:
    """Return the seed of a stream of training images."""
    return 10_000 * (1 + ("train", "calibrate", "finetune").index(purpose)) + seed


@cache
def glyph_masks(data: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw every class in every face: masks (classes * faces, S, S), S = FACTOR * side, and labels."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn, big = [], 4 * FACTOR * SIDES[data]
    for face in FACES:
        font = ImageFont.truetype(folder / f"{face}.ttf", round(0.95 * big))
        for character in ALPHABETS[data]:
            image = Image.new("L", (big, big))
            left, top, right, bottom = font.getbbox(character)
            corner = ((big - left - right) / 2, (big - top - bottom) / 2)
            ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
            drawn.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, big, big))
    masks = functional.avg_pool2d(torch.stack(drawn).float() / 255, 4)
    return masks[:, 0], torch.arange(len(ALPHABETS[data])).repeat(len(FACES))


@cache
def digit_masks(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the digits of a split, scaled from 8x8 to (N, 32, 32), from 0 to 1, and their labels."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    train, selection = DIGIT_SPLITS
    chosen = {
        "train": order[:train],
        "selection": order[train : train + selection],
        "report": order[train + selection :],
    }
    images = torch.from_numpy(found.images).float()[chosen[split], None] / 16
    images = functional.interpolate(images, (FACTOR * SIDES["digits"],) * 2, mode="bilinear", align_corners=False)
    return images[:, 0], torch.from_numpy(found.target)[chosen[split]].long()


def warp(masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate, scale, shear, shift and fade masks (N, S, S) at random and add noise: (N, 1, S / FACTOR, S / FACTOR)."""
    count, fine = len(masks), masks.shape[-1]

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, shear = uniform(-MAX_TURN, MAX_TURN), uniform(-MAX_CHANGE, MAX_CHANGE)
    wide, high = uniform(1 - MAX_CHANGE, 1 + MAX_CHANGE), uniform(1 - MAX_CHANGE, 1 + MAX_CHANGE)
    shifts = [2 * uniform(-MAX_CHANGE, MAX_CHANGE) for _ in range(2)]  # the grid goes from -1 to 1
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * wide, (shear * cos - sin) * high, shifts[0], sin * wide, (shear * sin + cos) * high, shifts[1]]
    matrices = torch.stack(rows, 1).view(count, 2, 3)
    grid = functional.affine_grid(matrices, [count, 1, fine, fine], align_corners=False)
    images = functional.grid_sample(masks[:, None], grid, align_corners=False)
    images = functional.avg_pool2d(images, FACTOR) * uniform(MIN_CONTRAST, 1).view(-1, 1, 1, 1)
    return normalised(images + NOISE * torch.randn(images.shape, generator=generator))


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Normalise images from [0, 1] to about mean 0 and standard deviation 1."""
    return (images - 0.2) / 0.3


def draw(data: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw training images (count, 1, side, side) and labels (count,) of a set of `SIDES` from a seed."""
    generator = torch.Generator().manual_seed(seed)
    masks, labels = digit_masks("train") if data == "digits" else glyph_masks(data)
    chosen = torch.randint(len(labels), (count,), generator=generator)
    return warp(masks[chosen], generator), labels[chosen]


@cache
def test_split(data: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels of the `selection` or `report` split; digits are neither warped nor noisy."""
    if data in ALPHABETS:
        return draw(data, TEST_IMAGES, {"selection": SELECTION, "report": REPORT}[split])
    masks, labels = digit_masks(split)
    return normalised(functional.avg_pool2d(masks[:, None], FACTOR)), labels
