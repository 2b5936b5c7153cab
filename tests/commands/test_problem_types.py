"""Images with one class each are never compared with outputs of another problem; batches with their targets are."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.command_line import refuse, succeed
from helpers.imagenet_cut import offline_on_cpu
from helpers.images import write_images
from helpers.tiny_models import TRANSFORMERS
from transformers import AutoConfig, ViTForImageClassification, ViTImageProcessor

from isoprune_hf import evaluate_model, load_base, load_data, prune
from isoprune_hf.errors import DatasetError
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import DataRecipe, PruneRecipe

PROBLEMS = {"multi_label_classification": 3, "regression": 3, "None": 1}
CUT = ["--prune.criterion", "l1", "--prune.ratio", "0.5"]
COMMANDS = {
    "evaluate": ["evaluate", "--model"],
    "finetune": ["finetune", "--finetune.epochs", "1", "--model"],
    "prune": ["prune", *CUT, "--prune.model"],
    "score": ["score", "--prune.model"],
}


@pytest.fixture(scope="module", autouse=True)
def offline_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with offline_on_cpu(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base of each problem, and of images of as many classes as it has outputs."""
    root = tmp_path_factory.mktemp("problems")
    for kind, count in PROBLEMS.items():
        values = {**TRANSFORMERS["hf-vit"].to_diff_dict(), "num_labels": count}
        torch.manual_seed(0)
        config = type(TRANSFORMERS["hf-vit"])(**values, problem_type=None if kind == "None" else kind)
        ViTForImageClassification(config).save_pretrained(root / kind)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / kind)
        write_images(root / "images" / str(count), {}, images=count)
    return root


@pytest.mark.parametrize("stage", COMMANDS)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_images_with_classes_are_refused(kind: str, stage: str, places: Path) -> None:
    images = places / "images" / str(PROBLEMS[kind])
    output = [] if stage == "evaluate" else ["--output", places / "out"]
    line = refuse(*COMMANDS[stage], places / kind, "--data.dataset", images, *output)
    assert f"config.problem_type of the model is {'regression' if kind == 'None' else kind}" in line
    assert not (places / "out").exists()


def test_calls_refuse_images_with_classes(places: Path) -> None:
    base, images = load_base(str(places / "regression")), places / "images" / "3"
    data = load_data(DataRecipe(dataset=str(images)))
    with pytest.raises(DatasetError, match="problem_type"):
        evaluate_model(base.model, data.evaluation, base.processor)
    with pytest.raises(DatasetError, match="problem_type"):
        prune(base.model, str(images), processor=base.processor)


def test_new_head_is_of_the_labels(places: Path) -> None:
    for names in (("a", "b"), ("a", "b", "c")):
        base = load_base(str(places / "regression"), num_labels=len(names), label_names=names)
        assert base.model.config.problem_type is None and base.model.config.label2id == {
            n: i for i, n in enumerate(names)
        }
    assert load_base(str(places / "regression"), num_labels=2).model.config.problem_type == "regression"


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_cut_by_weights_keeps_problem_type(layout: str, places: Path, tmp_path: Path) -> None:
    base = places / "multi_label_classification"
    succeed("prune", *CUT, "--prune.model", base, "--prune.layout", layout, "--output", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("multi_label_classification", "binary_cross_entropy"),
        pytest.param("regression", "squared_error", marks=pytest.mark.families),
    ],
)
def test_batches_are_scored_by_problem_type(kind: str, loss: str, places: Path) -> None:
    stock = ViTForImageClassification.from_pretrained(places / kind)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(3)[[0, 1, 2, 0]]  # also read as the shares of classes
    settings = {"criterion": "taylor", "ratio": 0.5, "batch_size": 2, "calibration_batches": 2}
    found = prune(stock, [(pixels, targets)], **settings)
    assert found.loss == loss and found.config.problem_type == kind
    assert prune(stock, [pixels], **settings).loss == "squared outputs"
    base = load_base(str(places / kind)).model
    batches = [(pixels[:2], targets[:2]), (pixels[2:], targets[2:])]
    result = prune_model(base, PruneRecipe(**settings), batches)
    for name, scores in result.scores.scores.items():
        assert torch.allclose(scores, found.scores.scores[name], rtol=1e-4), name
