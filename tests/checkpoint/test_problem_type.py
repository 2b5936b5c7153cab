"""The loss and the pipeline of a pruned model are those of the transformers class of its base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bases import CLASSES, WRAPPED, output_of, save_wrapped
from helpers.tiny_models import TRANSFORMERS
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.errors import CheckpointError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe

CASES: list[tuple[str | None, int, torch.Tensor]] = [
    (None, 3, torch.tensor([0, 2])),
    ("single_label_classification", 3, torch.tensor([0, 2])),
    ("multi_label_classification", 3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
    ("regression", 3, torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]])),
    ("regression", 1, torch.tensor([0.1, 2.0])),
    (None, 1, torch.tensor([0.1, 2.0])),
    (None, 3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
]


@pytest.mark.parametrize(("kind", "count", "labels"), CASES)
def test_loss_and_scores_are_those_of_the_base(
    kind: str | None, count: int, labels: torch.Tensor, tmp_path: Path
) -> None:
    config = type(TRANSFORMERS["hf-vit"])(
        **{**TRANSFORMERS["hf-vit"].to_diff_dict(), "num_labels": count, "problem_type": kind}
    )
    torch.manual_seed(0)
    stock = CLASSES["hf-vit"](config).eval()
    stock.save_pretrained(tmp_path / "stock")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "stock")
    base = load_base(str(tmp_path / "stock"))
    assert base.model.config.problem_type == kind
    images = torch.randn(2, 3, 16, 16)
    expected = stock(images, labels=labels).loss  # which records the problem type in the config of stock
    assert torch.equal(base.model(images, labels=labels).loss, expected)
    prune_model(base.model, PruneRecipe(criterion="l1", ratio=0.0, head_ratio=0.0)).save(
        tmp_path / "pruned", base.processor
    )
    pruned = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned")
    assert pruned.config.problem_type == kind
    assert torch.equal(pruned(images, labels=labels).loss, expected)
    image = Image.effect_noise((20, 20), 60).convert("RGB")
    both: list[Any] = [pipeline("image-classification", str(tmp_path / name))(image) for name in ("stock", "pruned")]
    assert both[0] == both[1]


def test_problem_type_of_timm_wrapper_is_kept(tmp_path: Path) -> None:
    stock = save_wrapped(tmp_path, *WRAPPED[0], problem_type="multi_label_classification").eval()
    base = load_base(str(tmp_path))
    images, labels = torch.randn(2, 3, 16, 16), torch.eye(4)[:2]
    assert torch.equal(output_of(base.model, images), output_of(stock, images))
    assert torch.equal(base.model(images, labels=labels).loss, stock(images, labels=labels).loss)


def test_unknown_problem_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"config\.problem_type"):
        IsoPruneConfig(problem_type="ranking")
