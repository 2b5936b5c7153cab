"""Mean average precision of boxes: by hand, over a split, on any number of ranks, and without its packages."""

import functools
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, List, Value
from helpers.ranks import call_on_ranks
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers import RTDetrImageProcessor, ViTImageProcessor, YolosImageProcessor

from isoprune_hf import IsoPruneConfig
from isoprune_hf.data.boxes import Objects
from isoprune_hf.data.columns import OBJECTS
from isoprune_hf.data.loading import LoaderOptions
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.box_precision import FoundBoxes, box_figures
from isoprune_hf.evaluation.detection import evaluate_objects
from isoprune_hf.models.detection_loss import DetectionLoss
from isoprune_hf.models.held import HeldModel

SQUARE = RTDetrImageProcessor(size={"height": 8, "width": 8})
SURE, RATHER, PERHAPS, NEVER = 3.0, 2.0, 1.0, -9.0  # logits
# Of two images of 40 x 20 and 20 x 40: two boxes of class 0, and one of class 1.
WANTED = [
    {"bbox": [[10, 2, 20, 10], [0, 10, 8, 8]], "category": [0, 1]},
    {"bbox": [[0, 20, 10, 20]], "category": [0]},
]
# In class 0 the first is right, the second is none, the third covers 64 % of its box. Class 1 is not found.
FOUND = [
    [([20, 7, 20, 10], [SURE, NEVER]), ([35, 15, 10, 10], [RATHER, NEVER])],
    [([4, 28, 8, 16], [PERHAPS, NEVER])],
]
# 51 of the 101 values of recall are up to 1/2, of precision 1; up to 1 the precision is 2/3 for overlaps up to 0.6.
AT_50 = (51 + 50 * 2 / 3) / 101 / 2
WANTED_FIGURES = {"box_map": (3 * AT_50 + 7 * 51 / 101 / 2) / 10, "box_map_50": AT_50}


class Network(nn.Module):
    """Finds the boxes of FOUND: the image, which is of one colour, says which."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = torch.full((len(images), 3, 2), NEVER), torch.full((len(images), 3, 4), 0.5)
        for row, image in enumerate(images):
            place = int(image[0, 0, 0] > 0.5)
            size = torch.tensor([[40, 20, 40, 20], [20, 40, 20, 40]])[place]
            for query, (box, scores) in enumerate(FOUND[place]):
                logits[row, query], boxes[row, query] = torch.tensor(scores), torch.tensor(box) / size
        return logits, boxes


def make_split(copies: int = 1) -> Dataset:
    images = [PILImage.new("RGB", size, (255 * place,) * 3) for place, size in enumerate([(40, 20), (20, 40)])]
    box = List(List(Value("float32"), length=4))
    features = {"image": Image(), "label": Value("int64"), OBJECTS: {"bbox": box, "category": List(Value("int64"))}}
    rows = {"image": images * copies, "label": [0, 0] * copies, OBJECTS: WANTED * copies}
    return Dataset.from_dict(rows, features=Features(features))


def measure(split: Dataset, accelerator: Accelerator | None = None, processor=SQUARE, size: int = 3) -> dict:
    config = IsoPruneConfig(image_size=[3, 8, 8], id2label={0: "a", 1: "b"})
    model = HeldModel(config, Network(), DetectionLoss(2))
    return evaluate_objects(model, None, split, processor, LoaderOptions(size), accelerator=accelerator)


def test_precision_is_the_one_by_hand() -> None:
    figures = measure(make_split())
    assert figures == pytest.approx({**WANTED_FIGURES, "images": 2})


def test_copies_of_images_change_nothing() -> None:
    # The n-th copies have equal scores, so that precision and recall have the same steps.
    assert measure(make_split(3)) == pytest.approx({**WANTED_FIGURES, "images": 6})


def test_crowd_counts_neither_way() -> None:
    box, other = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[0.0, 0.0, 20.0, 10.0]])
    kind, score = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    wanted = Objects(torch.cat([box, other]), torch.zeros(2, dtype=torch.int64), torch.tensor([False, True]))
    assert box_figures([FoundBoxes(box, kind, score)], [wanted]) == {"box_map": 1.0, "box_map_50": 1.0}


def test_split_without_objects_has_no_precision() -> None:
    none = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    assert box_figures([FoundBoxes(torch.zeros(0, 4), none.classes, torch.zeros(0))], [none]) == {}


def test_outside_box_of_split_is_refused() -> None:
    split = make_split()
    rows = split.remove_columns(OBJECTS).add_column(OBJECTS, WANTED[::-1], feature=split.features[OBJECTS])
    with pytest.raises(DatasetError, match=r"image 0 of its split have the box .* 40 pixels wide and 20 high"):
        measure(rows)


def test_processor_that_changes_images_is_refused() -> None:
    padding = YolosImageProcessor(size={"height": 8, "width": 8}, pad_size={"height": 9, "width": 9})
    with pytest.raises(DatasetError, match="crops or pads"):
        measure(make_split(), processor=padding)
    with pytest.raises(DatasetError, match="got ViTImageProcessor"):
        measure(make_split(), processor=ViTImageProcessor(size={"height": 8, "width": 8}))


@pytest.mark.parametrize("package", ["pycocotools", "torchmetrics"])
def test_missing_package_leaves_precision_out(
    package: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with caplog.at_level(logging.WARNING):
        assert measure(make_split()) == {"images": 2}
    assert caplog.messages == [
        "data: the boxes of the images are not looked at: the mean average precision of boxes needs "
        f"{package}, which is not installed: pip install isoprune-hf[detection]"
    ]


def save_measured(accelerator: Accelerator, folder: Path) -> None:
    figures = measure(make_split(3).select(range(5)), accelerator, size=1)
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(figures), encoding="utf-8")


@pytest.mark.launch
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    call_on_ranks(functools.partial(save_measured, folder=tmp_path), tmp_path / "log")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1] == measure(make_split(3).select(range(5)))
