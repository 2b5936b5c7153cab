"""The tokenizer of a base lies beside the weights of a network that reads texts, if the base has one."""

from pathlib import Path

import pytest
import transformers
from helpers.clip_networks import make_clip, save_published

from isoprune_hf import IsoPruneConfig
from isoprune_hf.checkpoint.tokenizer import save_tokenizer


def config_of(place: Path, task: str = "zero-shot-image-classification") -> IsoPruneConfig:
    return IsoPruneConfig(base={"library": "transformers", "task": task}, source={"name": str(place)})


def test_tokenizer_of_the_base_is_written(tmp_path: Path) -> None:
    save_published(make_clip(), tmp_path / "base")
    save_tokenizer(tmp_path / "folder", config_of(tmp_path / "base"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")("red")["input_ids"] == [1, 11, 2]
    save_tokenizer(tmp_path / "other", config_of(tmp_path / "base", "image-feature-extraction"))
    assert not (tmp_path / "other").exists()


def test_base_without_tokenizer_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_clip().save_pretrained(tmp_path / "base")  # for which transformers makes a tokenizer without words
    save_tokenizer(tmp_path / "folder", config_of(tmp_path / "base"))
    assert "no tokenizer is written" in caplog.text and "it has no words" in caplog.text
    assert not (tmp_path / "folder").exists()
