"""Labelled images: two splits with the same columns and the same classes; call `load_data`.

Images stay encoded until they are used; `decoding` reads them then.
"""

import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from datasets import Array3D, Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from isoprune_hf.data.class_columns import name_classes
from isoprune_hf.data.columns import MASK, OBJECTS, NamedColumn, find_column, is_file, is_image
from isoprune_hf.data.decoding import DECODE_ERRORS, Decoding, Rows
from isoprune_hf.data.fingerprint import fingerprint_images
from isoprune_hf.data.holdout import HOLDOUT_SEED, divide
from isoprune_hf.data.label_columns import Split, is_multi_label, label_bytes, label_kind
from isoprune_hf.data.sources import open_splits
from isoprune_hf.data.splits import UNDIVIDED
from isoprune_hf.data.unlabelled import with_label_column
from isoprune_hf.errors import DatasetError
from isoprune_hf.limits import MAX_IMAGE_BYTES
from isoprune_hf.plain_files import read_bytes
from isoprune_hf.recipes import DataRecipe
from isoprune_hf.recipes.values import MULTI_LABEL, ProblemType

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator


@dataclass(frozen=True)
class ImageData:
    """Two splits with exactly the columns `image` and `label`, which is a class or a list of classes in both.

    Args:
        train: For calibration and finetuning; a stream with `data.streaming`.
        evaluation: For evaluation; a sample of the split with `data.eval_images`.
        label_names: Names of the classes by index.
        name: Value of `data.dataset`.
        fingerprint: Digest of the class names and of the labels of both splits in their order; equal on every machine.
            It leaves out the labels of a stream, which are not known.
        decoding: How the images are read.
        buffer: Number of rows of `train` that are shuffled together if it is a stream, else None.
        split_images: Number of images of the evaluation split if `evaluation` is a sample of it, else None. Of images
            that are held out, it is the number of training images before.
        eval_name: Name of the evaluation split.
        eval_fingerprint: Digest of the images of `evaluation`, see `fingerprint_images`.
        is_order_ambiguous: The classes have the order of their sorted names, and sorted by characters they would have
            another one; the labels of a model without names of classes may have either.
        is_undivided: The data set has no splits, and `train` is all of it, or the part that the recipe names.
        holdout: Share of the training images that `evaluation` is held out of; 0 if it is all of them, None if it is a
            split of its own.
        named: The column that `data.label_column` names; None with the default.
    """

    train: Dataset | IterableDataset | None
    evaluation: Dataset | None
    label_names: tuple[str, ...]
    name: str
    fingerprint: str
    decoding: Decoding = field(default_factory=Decoding)
    buffer: int | None = None
    split_images: int | None = None
    eval_name: str | None = None
    eval_fingerprint: str | None = None
    is_order_ambiguous: bool = False
    is_undivided: bool = False
    holdout: float | None = None
    named: NamedColumn | None = None

    @property
    def is_multi_label(self) -> bool:
        """Return whether each image has a list of classes."""
        return is_multi_label(self.train if self.evaluation is None else self.evaluation)

    @property
    def problem_type(self) -> ProblemType | None:
        """Return the problem type of a model of the labels, in transformers; None for one class of each image."""
        return MULTI_LABEL if self.is_multi_label else None

    @property
    def identity(self) -> dict[str, str | float]:
        """Return what identifies the images of a run that is resumed, by its name in an error."""
        held_out = {} if not self.holdout else {"data.holdout": self.holdout}
        return {"the data set": self.fingerprint, **held_out}

    def evaluating_all(self, images: int | None) -> "ImageData":
        """Return the images of an undivided data set, or a sample of so many, as the split for evaluation."""
        if self.evaluation is not None or not self.is_undivided or not isinstance(self.train, Dataset):
            return self
        sample = _sample(self.train, images)
        return replace(
            self,
            train=None,
            evaluation=sample,
            split_images=None if sample is self.train else len(self.train),
            eval_name=UNDIVIDED,
            holdout=0.0,
            eval_fingerprint=fingerprint_images(with_encoded_images(sample), self.label_names),
        )

    def with_provenance(self, figures: Mapping[str, float | int]) -> dict[str, float | int | str]:
        """Return figures of an evaluation with the images that they were measured on.

        `data` is the fingerprint of the images, `split` their split, and `split_images` the number of images of the
        split if they are a sample of it; `holdout_seed` is the seed by which training images were held out.
        """
        origin = {
            "data": self.eval_fingerprint,
            "split": self.eval_name,
            "split_images": self.split_images,
            "holdout_seed": HOLDOUT_SEED if self.holdout else None,
        }
        return {**figures, **{name: value for name, value in origin.items() if value is not None}}


def load_data(recipe: DataRecipe) -> ImageData:
    """Open the data set of a recipe; a split that it does not have is None.

    Without a split for evaluation, images of the training split are held out for it, see `divide`.

    Raises:
        DatasetError: The data set cannot be opened, or its splits, columns or labels do not fit image classification.
    """
    opened = open_splits(recipe)
    selected = {name: [_select(part, name, recipe) for part in parts] for name, parts in opened.splits.items()}
    splits, label_names = name_classes(selected, recipe)
    has_texts = any(
        not hasattr(label_kind(part.features["label"]), "names") for parts in selected.values() for part in parts
    )
    division = divide(splits, opened.chosen, recipe)
    train, whole = division.train, division.evaluation
    digest = hashlib.sha256("\n".join(label_names).encode())
    for split in (train, whole):
        if isinstance(split, Dataset):
            digest.update(label_bytes(split))
        else:
            digest.update(b"none" if split is None else b"stream")
    evaluation = _sample(whole, recipe.eval_images) if isinstance(whole, Dataset) else None
    _warn_of_wide_images(str(recipe.dataset), (train, whole))
    is_sample = division.held_out_of is None and evaluation is not whole
    return ImageData(
        train=train,
        evaluation=evaluation,
        label_names=label_names,
        name=str(recipe.dataset),
        fingerprint=digest.hexdigest()[:16],
        decoding=Decoding(
            broken=recipe.broken, max_broken=recipe.max_broken, exif=recipe.exif, decoder=recipe.decoder
        ),
        buffer=recipe.shuffle_buffer if recipe.streaming else None,
        split_images=len(whole) if isinstance(whole, Dataset) and is_sample else division.held_out_of,
        eval_name=division.eval_name,
        eval_fingerprint=(
            None if evaluation is None else fingerprint_images(with_encoded_images(evaluation), label_names)
        ),
        is_order_ambiguous=(opened.is_sorted or has_texts) and list(label_names) != sorted(label_names),
        is_undivided=opened.chosen.is_undivided,
        holdout=None if division.held_out_of is None else recipe.held_out,
        named=opened.named,
    )


def _warn_of_wide_images(name: str, splits: Sequence[Split | None]) -> None:
    """Log a line if the first image of a split is grey of more than 8 bits, which decoding clips to white."""
    if any(_is_wide(split) for split in splits if isinstance(split, Dataset) and len(split)):
        logger.warning(
            f"data: {name} has grey images of more than 8 bits; values above 255 become white, as in torchvision and "
            "pipelines: convert the files to 8 bits"
        )


def _is_wide(split: Dataset) -> bool:
    image = with_encoded_images(split)[0]["image"]
    if not isinstance(image, dict):
        return False
    try:
        encoded = read_bytes(image["path"], MAX_IMAGE_BYTES) if image["bytes"] is None else image["bytes"]
        with PILImage.open(io.BytesIO(encoded)) as opened:
            return opened.mode[0] in "IF"
    except DECODE_ERRORS:
        return False  # reported where it is used


def _sample(split: Dataset, count: int | None) -> Dataset:
    """Return a sample of so many images in the order of the split; the split itself if it has no more."""
    if count is None or count >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(0).permutation(len(split))[:count]))


def labelled_rows(rows: Dataset) -> ImageData:
    """Return rows with the columns `image` and `label` as a training split.

    Raises:
        DatasetError: The rows have no such columns.
    """
    recipe = DataRecipe(dataset="rows")
    (part,) = with_label_column({"train": [rows]}, recipe)["train"]
    splits, label_names = name_classes({"train": [_select(part, "train", recipe)]}, recipe)
    digest = hashlib.sha256("\n".join(label_names).encode() + label_bytes(splits["train"]))
    return ImageData(splits["train"], None, label_names, "rows", digest.hexdigest()[:16])


def with_encoded_images(rows: Rows) -> Rows:
    """Return the rows of a data set with their images as stored: a path or bytes, or an array of uint8.

    Other rows are returned unchanged.
    """
    if not isinstance(rows, Dataset):
        return rows
    encoded: Rows
    if isinstance(rows.features["image"], Array3D):
        encoded = rows.with_format("numpy", columns=["image"], output_all_columns=True, dtype=np.uint8)
    else:
        encoded = rows.cast_column("image", Image(decode=False))
    return encoded


def _select(split: Split, name: str, recipe: DataRecipe) -> Split:
    """Reduce a split to the columns `image`, `label`, and `MASK` and `OBJECTS` if it has any of them.

    Images are encoded or arrays.
    """
    image = find_column(split, "image_column", recipe, name)
    label = find_column(split, "label_column", recipe, name)
    feature = split.features[image]
    if not is_file(feature) and not is_image(feature):
        raise DatasetError(
            f"data.image_column: column {image!r} of {recipe.dataset!r} must contain images, or arrays of uint8 "
            f"(Array3D), got {feature}"
        )
    is_array = isinstance(feature, Array3D)
    is_stream = isinstance(split, IterableDataset)
    if not is_array and (is_stream or is_file(feature) or not feature.decode):
        # A stream must be cast here: any later operation on it would decode its images.
        split = split.cast_column(image, Image(decode=not is_stream))
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    kept = [image, label, *(name for name in (MASK, OBJECTS) if name in split.features)]
    return split.select_columns(kept).rename_columns(renamed)


def prediction_features() -> Features:
    """Return the columns that the metrics of `evaluation` take, for the `evaluate` library."""
    return Features(
        {
            "predictions": List(Value("int64")),
            "references": Value("int64"),
            "losses": Value("float64"),
            "confidences": Value("float64"),
        }
    )
