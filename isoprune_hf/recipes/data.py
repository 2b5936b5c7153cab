"""The section `data`: where the labelled images come from."""

from dataclasses import dataclass, field
from typing import Literal

from isoprune_hf.recipes.values import IGNORED_FOR_RESUME, Interpolation, check_range


@dataclass(frozen=True)
class DataRecipe:
    """Where the labelled images come from.

    Args:
        dataset: A Hub id such as ILSVRC/imagenet-1k, a folder of parquet files or of WebDataset's tar files (names of
            the classes in `classes.txt`, a line each), a folder with `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`, or
            `digits` (1,797 real handwritten digits that scikit-learn ships).
        revision: Git revision of a Hub data set.
        image_column: Column that holds the image.
        label_column: Column that holds the class.
        train_split: Split for calibration and finetuning.
        eval_split: Split for evaluation.
        streaming: Read the training split as a stream, and keep no copy of it here; needs `finetune.steps_per_epoch`.
            The evaluation split is fetched whole.
        shuffle_buffer: Images of a stream that are shuffled at once, encoded in the memory of each rank.
        resize: Pixels that the shorter side of an image has before its centre is cropped to the model's size, for
            scoring and evaluation; the default is the model's own. A folder that is written keeps it.
        interpolation: Of that resize, and of random crops; the default is the model's own.
        broken: What is done about an image that cannot be read: error; skip trains on the next one of the split in its
            place, and leaves it out of an evaluation; grey takes a grey image in its place. A warning names each.
        max_broken: More of them in an epoch or an evaluation are an error.
        exif: Turn images upright by their EXIF tag; false takes them as they are stored, as torchvision does.
        decoder: pil gives exactly the pixels of the model's processor; torchvision decodes, resizes and crops 8 bits,
            three times as fast in an evaluation, and differs by 1 of 255 here and there, at sharp edges by 2.
        batch_size: Images in an evaluation batch on each rank.
        num_workers: Loader processes on each rank.
    """

    dataset: str | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    revision: str | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    eval_split: str = "validation"
    streaming: bool = False
    shuffle_buffer: int = 4096
    resize: int | None = None
    interpolation: Interpolation | None = None
    broken: Literal["error", "skip", "grey"] = "error"
    max_broken: int = field(default=100, metadata=IGNORED_FOR_RESUME)
    exif: bool = True
    decoder: Literal["pil", "torchvision"] = "pil"
    batch_size: int = field(default=64, metadata=IGNORED_FOR_RESUME)
    num_workers: int = field(default=0, metadata=IGNORED_FOR_RESUME)

    def __post_init__(self) -> None:
        check_range("data", "resize", self.resize, 1, 2**14)
        check_range("data", "shuffle_buffer", self.shuffle_buffer, 1)
        check_range("data", "max_broken", self.max_broken, 0)
        check_range("data", "batch_size", self.batch_size, 1)
        check_range("data", "num_workers", self.num_workers, 0)
