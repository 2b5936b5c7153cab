"""Read real images for `coverage.py`: those of a parquet file, or the handwritten digits that scikit-learn ships."""

import io
from pathlib import Path

import torch
from PIL import Image
from transformers import BaseImageProcessor

from isoprune_hf.data.dataset import load_data
from isoprune_hf.recipes import DataRecipe


def read_images(parquet: Path | None, count: int) -> list[Image.Image]:
    """Return the first images of the column `img` or `image` of a parquet file; of the digits without a file."""
    if parquet is None:
        digits = load_data(DataRecipe(dataset="digits")).train
        return [digits[index]["image"].convert("RGB") for index in range(count)]
    from pyarrow import parquet as reader

    file = reader.ParquetFile(parquet)
    column = next(name for name in file.schema_arrow.names if name in ("img", "image"))
    rows = next(file.iter_batches(count, columns=[column]))[column].to_pylist()
    return [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows]


def pixels(images: list[Image.Image], processor: BaseImageProcessor) -> torch.Tensor:
    """Return images as a processor scales and normalises them: (B, 3, H, W)."""
    values: torch.Tensor = processor(images, return_tensors="pt").pixel_values
    return values
