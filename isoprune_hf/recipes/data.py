"""The section `data`: the labelled images."""

from dataclasses import dataclass, field
from typing import Any, Literal

from isoprune_hf.limits import MAX_PROCESSED_SIDE
from isoprune_hf.recipes.values import (
    IGNORED_FOR_RESUME,
    IMAGES,
    SHARE_BELOW_ONE,
    Interpolation,
    Range,
    check_choices,
    check_numbers,
    whole,
)

DEFAULT_HOLDOUT = 0.1
TRANSFORM = ("image_size", "resize", "interpolation", "mean", "std")
RANGES = {
    "eval_images": whole(1, 2**40),
    "holdout": SHARE_BELOW_ONE,
    "shuffle_buffer": whole(1, 2**20),
    "image_size": whole(1, MAX_PROCESSED_SIDE),
    "resize": whole(1, MAX_PROCESSED_SIDE),
    "mean": Range(0, 1),
    "std": Range(1e-6, 1),
    "max_broken": whole(0, 2**40),
    "batch_size": IMAGES,
    "num_workers": whole(0, 1024),
}


@dataclass(frozen=True)
class DataRecipe:
    """The labelled images for scoring, finetuning and evaluation.

    Args:
        dataset: A Hub id such as ILSVRC/imagenet-1k; a folder or file of images (docs/data.md has a table): class
            folders or a zip of them, parquet, WebDataset tar files, CSV with paths, `save_to_disk`; or `digits` (1,797
            real handwritten digits that scikit-learn ships). `classes.txt` in the folder names the classes in order,
            one per line.
        revision: Git revision of a Hub data set.
        image_column: Column of the images; by default found by its name or type.
        label_column: Column of the classes, which are class labels, whole numbers from 0 on, or text; for segmentation
            that of the masks, for detection that of the boxes; by default found by its name or type.
        train_split: Split for calibration and finetuning, or a part of it such as train[:80%].
        eval_split: Split for evaluation, or a part; by default validation, valid, val, dev or test in any case.
        eval_images: Evaluate on a sample of so many images of that split, drawn once and equal for every model; by
            default on all of them. The number is stored and shown with the figures.
        streaming: Stream the training split without storing a copy; needs `finetune.steps_per_epoch`. The evaluation
            split is downloaded.
        shuffle_buffer: Images of a stream that are shuffled at once; each rank keeps them encoded in memory.
        resize: Length in pixels of the shorter side of an image before the centre crop, for scoring and evaluation; by
            default that of the model. It is saved with a pruned model.
        interpolation: Interpolation of that resize, and of random crops; by default that of the model.
        mean: Mean of each channel, of values from 0 to 1, that is subtracted from images; by default that of the
            model. It is saved with a pruned model, and so is `std`.
        std: Number for each channel that images are divided by after that.
        broken: How to handle an image that cannot be read: error stops; skip trains on the next image of the split
            instead and omits the image from an evaluation; grey uses a grey image instead. A warning names each image.
        max_broken: Stop if an epoch or an evaluation has more broken images.
        exif: Rotate images according to their EXIF tag; false uses them as stored, like torchvision.
        decoder: pil gives exactly the pixels of the model's processor; torchvision decodes, resizes and crops 8-bit
            images, which makes an evaluation three times as fast; pixels differ by 1 of 255, at sharp edges by 2.
        batch_size: Images per rank in an evaluation batch.
        num_workers: Loader processes per rank; by default as many as this rank has CPUs, at most 16, and one for each
            1,024 images (none on macOS and Windows).
        image_size: Side in pixels of the images that the model reads, such as 32 for a convolutional network; by
            default that of the model. Resize and crop keep their proportion. It is saved with a pruned model.
        subset: Subset (configuration) of a Hub data set that has several.
        holdout: Share of the training images that is held out by a seed for evaluation, if the data set has no split
            for it: by default 0.1, or that of the model's folder. 0 holds none out, and so does a stream.
    """

    dataset: str | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    revision: str | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    eval_split: str = "validation"
    eval_images: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 4096
    resize: int | None = None
    interpolation: Interpolation | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    broken: Literal["error", "skip", "grey"] = "error"
    max_broken: int = field(default=100, metadata=IGNORED_FOR_RESUME)
    exif: bool = True
    decoder: Literal["pil", "torchvision"] = "pil"
    batch_size: int = field(default=64, metadata=IGNORED_FOR_RESUME)
    num_workers: int | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    image_size: int | None = None
    subset: str | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    holdout: float | None = field(default=None, metadata=IGNORED_FOR_RESUME)  # see `ImageData.identity`

    def __post_init__(self) -> None:
        if self.dataset is not None:  # `hf:` marks a name of the Hub for readers
            object.__setattr__(self, "dataset", self.dataset.removeprefix("hf:"))
        check_choices("data", self)
        check_numbers("data", self, RANGES)

    @property
    def held_out(self) -> float:
        """Return the share of the training images that is held out if there is no split for evaluation."""
        return 0.0 if self.streaming else DEFAULT_HOLDOUT if self.holdout is None else self.holdout

    @property
    def transform(self) -> dict[str, Any]:
        """Return the settings of the evaluation transform that replace those of the model."""
        return {name: value for name in TRANSFORM if (value := getattr(self, name)) is not None}
