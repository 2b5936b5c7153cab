"""The card: each figure equals its source, and what was not measured is not there."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import __version__ as transformers_version

from isoprune_hf.errors import CheckpointError
from isoprune_hf.publishing.model_card import build_model_card

BASE = "timm/deit_small_patch16_224.fb_in1k"


def make_folder(folder: Path, metrics: dict[str, Any] | None = None, **changes: Any) -> Path:
    config = {
        "model_type": "isoprune",
        "base": {"library": "timm", "architecture": "deit_small_patch16_224", "args": {}},
        "source": {"name": BASE, "pretrained": True, "seed": 0},
        "structure": {"shapes": {}, "attributes": {}, "removed": ["blocks.3"]},
        "cost": {
            "base": {"macs": 4_608_338_304, "params": 22_050_664},
            "pruned": {"macs": 1_152_084_576, "params": 8_820_266},
        },
        "recipe": {
            "prune": {
                "criterion": "taylor",
                "scope": "isomorphic",
                "ratio": 0.625,
                "head_dim_ratio": None,
                "model": BASE,
            }
            | {"calibration_batches": 40, "batch_size": 32, "seed": 7},
            "data": {"dataset": "ILSVRC/imagenet-1k", "train_split": "train", "eval_split": "validation"},
            "finetune": {"epochs": 11, "learning_rate": 0.0003, "crop_scale": [0.2, 1.0]},
        },
        "image_size": [3, 224, 160],
        "stage": "finetuned",
        "id2label": {str(index): f"class {index}" for index in range(5)},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "pruning_plan.json").write_bytes(b"{}")
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def read_table(text: str, heading: str) -> list[list[str]]:
    lines = text.split(f"\n{heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-:")]


def test_every_figure_of_the_results_equals_its_source(tmp_path: Path) -> None:
    metrics = {
        "base": {"top1": 0.79854, "top5": 0.9495, "loss": 0.91231, "images": 50_000},
        "pruned": {"top1": 0.001, "top5": 0.005, "loss": 6.9, "images": 50_000},
        "finetuned": {"top1": 0.75, "top5": 0.92125, "loss": 1.1, "images": 50_000},
    }
    folder = make_folder(tmp_path / "deit", metrics)
    speed = {"milliseconds": {"base": 12.344, "finetuned": 4.5}, "device": "cpu", "threads": 3, "batch_size": 1}
    (folder / "speed.json").write_text(json.dumps(speed))
    card = build_model_card(folder, repo="me/deit")
    assert "forward pass of 1 image in eager PyTorch on cpu with 3 threads" in card.text
    assert read_table(card.text, "## Results") == [
        ["model", "GMACs", "params (M)", "top-1 %", "top-5 %", "loss", "latency (ms)", "images"],
        ["base", "4.61", "22.05", "79.85", "94.95", "0.9123", "12.34", "50,000"],
        ["pruned", "1.15", "8.82", "0.10", "0.50", "6.9000", "–", "50,000"],  # noqa: RUF001
        ["finetuned", "1.15", "8.82", "75.00", "92.12", "1.1000", "4.50", "50,000"],
    ]
    # 1,152,084,576 of 4,608,338,304 MACs stay: 25 %; 8,820,266 of 22,050,664 parameters: 40 %.
    assert "75.0 % of the MACs and 60.0 % of the parameters are gone" in card.text
    assert "(4.61 → 1.15 GMACs, 22.05 → 8.82 M parameters), 1 whole block among them." in card.text
    assert "images of 3 × 224 × 160" in card.text  # noqa: RUF001
    assert "Output: 5 classes." in card.text
    assert "(at most 1,280 images)" in card.text
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {"top-1 accuracy": 0.75, "top-5 accuracy": 0.92125}


def test_the_settings_are_those_of_the_recipe(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit"))
    cut, finetuning = read_table(card.text, "## How it was cut"), read_table(card.text, "## Finetuning")
    assert dict(cut[1:]) == {
        "criterion": "taylor",
        "scope": "isomorphic",
        "ratio": "0.625",
        "model": BASE,
        "calibration_batches": "40",
        "batch_size": "32",
        "seed": "7",
    }
    assert dict(finetuning[1:]) == {"epochs": "11", "learning_rate": "0.0003", "crop_scale": "[0.2, 1.0]"}


def test_the_metadata_name_base_data_and_library(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", {"finetuned": {"top1": 0.5}}), repo="me/deit")
    data = yaml.safe_load(str(card).split("---")[1])
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["isoprune", "isomorphic-pruning", "pruning", "timm"]
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "finetune")
    assert data["datasets"] == "ILSVRC/imagenet-1k"
    assert [entry["name"] for entry in data["model-index"]] == ["deit"]
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_without_metrics_there_is_no_accuracy_anywhere(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", stage="pruned"))
    table = read_table(card.text, "## Results")
    assert table == [["model", "GMACs", "params (M)"], ["base", "4.61", "22.05"], ["pruned", "1.15", "8.82"]]
    assert card.data.eval_results is None
    assert "top-1" not in str(card)
    assert "model-index" not in str(card)
    assert "The weights were not trained after the cut." in card.text


def test_results_of_the_base_are_not_reported_as_those_of_the_model(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", {"base": {"top1": 0.8}, "pruned": {"top1": 0.1}}))
    assert card.data.eval_results is None


def test_without_costs_and_recipe_no_figure_is_invented(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", cost=None, recipe=None, structure=None, id2label={}))
    assert read_table(card.text, "## Results") == [["model"], ["base"], ["pruned"], ["finetuned"]]
    assert "are gone" not in card.text
    assert "Calibration" not in card.text
    assert "classes." not in card.text.split("## Results")[0]
    assert "No data set is recorded." in card.text
    assert "the settings are not recorded" in card.text


def test_no_path_leaves_with_the_card(tmp_path: Path) -> None:
    secret = tmp_path / "home" / "alice" / "photos"
    secret.mkdir(parents=True)
    recipe = {
        "prune": {"model": str(secret), "model_args": {"root": str(secret)}},
        "data": {"dataset": str(secret), "train_split": "train", "eval_split": "test"},
        "finetune": {"teacher": f"../alice/{secret.name}/", "auto_augment": "C:\\alice\\policy"},
    }
    folder = make_folder(
        tmp_path / "deit",
        {"finetuned": {"top1": 0.5}},
        source={"name": str(secret), "pretrained": True},
        recipe=recipe,
    )
    card = str(build_model_card(folder))
    assert "alice" not in card
    assert str(tmp_path) not in card
    assert card.count("a local folder (photos)") >= 5
    assert "base_model" not in card
    assert "\ndatasets" not in card


@pytest.mark.parametrize(
    "source",
    [
        {"name": BASE, "pretrained": False, "seed": 3},
        {"name": "torchvision/resnet50", "pretrained": True},
        {"name": "resnet50", "pretrained": True},
    ],
)
def test_only_trained_weights_of_the_hub_are_a_base_model(tmp_path: Path, source: dict[str, Any]) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", source=source))
    assert card.data.base_model is None
    assert f"`{source['name']}`" in card.text
    assert ("random weights, drawn with seed 3" in card.text) is not source["pretrained"]


def test_a_relative_folder_that_looks_like_a_hub_id_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "dense").mkdir(parents=True)
    card = build_model_card(make_folder(tmp_path / "deit", source={"name": "output/dense", "pretrained": True}))
    assert card.data.base_model is None
    assert "output/dense" not in str(card)


def test_a_pruned_model_claims_no_finetuning(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", stage="pruned"))
    assert card.data.base_model == BASE
    assert "base_model_relation" not in str(card)
    assert "epochs" not in card.text


def test_the_cut_of_another_scope_is_not_called_isomorphic(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", recipe={"prune": {"scope": "global"}}))
    assert "cut with structured pruning (scope `global`)" in card.text


def test_hashes_versions_snippets_and_citation_are_there(tmp_path: Path) -> None:
    text = build_model_card(make_folder(tmp_path / "deit"), repo="me/deit").text
    assert f"| model.safetensors | `{hashlib.sha256(b'weights').hexdigest()}` |" in text
    assert f"| pruning_plan.json | `{hashlib.sha256(b'{}').hexdigest()}` |" in text
    assert f"transformers {transformers_version}" in text
    assert 'pipeline("image-classification", model="me/deit", trust_remote_code=True)' in text
    assert "isoprune evaluate --model me/deit" in text
    assert "arXiv:2407.04616" in text
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(snippet, "card", "exec")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{", "config.json: not readable as JSON"),
        ("config.json", '{"model_type": "vit"}', "model_type 'vit'"),
        ("config.json", '{"model_type": "isoprune", "stage": "best"}', "stage 'best'"),
        ("metrics.json", "[]", "metrics.json: must hold a mapping, got list"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, file: str, text: str | None, words: str) -> None:
    folder = make_folder(tmp_path / "deit")
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        build_model_card(folder)
