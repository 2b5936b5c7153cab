"""The section `data`: where the labelled images come from."""

from dataclasses import dataclass

from isoprune_hf.recipes.values import Interpolation, check_range


@dataclass(frozen=True)
class DataRecipe:
    """Where the labelled images come from.

    Args:
        dataset: A Hub id such as ILSVRC/imagenet-1k, a folder of parquet files, a folder with train/CLASS/*.JPEG and
            val/CLASS/*.JPEG, or `digits` (1,797 real handwritten digits that scikit-learn ships).
        revision: Git revision of a Hub data set.
        image_column: Column that holds the image.
        label_column: Column that holds the class.
        train_split: Split for calibration and finetuning.
        eval_split: Split for evaluation.
        resize: Pixels that the shorter side of an image has before its centre is cropped to the model's size, for
            scoring and evaluation; the default is the model's own. A folder that is written keeps it.
        interpolation: Of that resize, and of random crops; the default is the model's own.
        batch_size: Images in an evaluation batch on each rank.
        num_workers: Loader processes on each rank.
    """

    dataset: str | None = None
    revision: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    eval_split: str = "validation"
    resize: int | None = None
    interpolation: Interpolation | None = None
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_range("data", "resize", self.resize, 1, 2**14)
        check_range("data", "batch_size", self.batch_size, 1)
        check_range("data", "num_workers", self.num_workers, 0)
