"""The model card: every figure equals its source, and unmeasured figures are omitted."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_line import isoprune
from helpers.fresh_python import FreshPython
from helpers.own_nets import TwoInputs
from helpers.pruned_models import LABELS, Pruned
from huggingface_hub import ModelCard
from PIL import Image
from transformers import __version__ as transformers_version

from isoprune_hf import prune
from isoprune_hf.checkpoint.needed import NEEDED
from isoprune_hf.cli.parser import parse
from isoprune_hf.errors import CheckpointError
from isoprune_hf.reporting.card_metadata import License, list_benchmark_entries
from isoprune_hf.reporting.model_card import build_model_card, is_unedited

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
    (folder / "preprocessor_config.json").write_text("{}")
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def read_table(text: str, heading: str) -> list[list[str]]:
    lines = text.split(f"\n{heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-:")]


@pytest.mark.parametrize(("kind", "packages"), [("timm_backbone", "pillow timm`"), ("resnet", "pillow`")])
def test_card_names_timm_for_its_backbone(kind: str, packages: str, tmp_path: Path) -> None:
    base = {"library": "transformers", "task": "object-detection", "config": {"backbone_config": {"model_type": kind}}}
    assert f"{packages})" in build_model_card(make_folder(tmp_path / "model", base=base)).content


def test_results_equal_their_sources(tmp_path: Path) -> None:
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
        ["model", "GMACs", "params (M)", "top-1 %", "top-5 %", "loss", "latency (ms)", "images", "weights (MB)"],
        ["base", "4.61", "22.05", "79.85", "94.95", "0.9123", "12.34", "50,000", "–"],  # noqa: RUF001
        ["pruned", "1.15", "8.82", "0.10", "0.50", "6.9000", "–", "50,000", "–"],  # noqa: RUF001
        ["finetuned", "1.15", "8.82", "75.00", "92.12", "1.1000", "4.50", "50,000", "7e-06"],
    ]
    # 1,152,084,576 of 4,608,338,304 MACs stay: 25 %; 8,820,266 of 22,050,664 parameters: 40 %.
    assert "75.0 % of the MACs and 60.0 % of the parameters were removed" in card.text
    assert "(4.61 → 1.15 GMACs, 22.05 → 8.82 M parameters), including 1 whole block." in card.text
    assert "images of 3 × 224 × 160" in card.text  # noqa: RUF001
    assert "Output: 5 classes: class 0, class 1, class 2, class 3, class 4." in card.text
    assert "(at most 1,280 images)" in card.text
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    counted = {"MACs of one image (torch.utils.flop_counter)": 1_152_084_576}
    assert values == {"top-1 accuracy": 0.75, "top-5 accuracy": 0.92125, "loss": 1.1, **counted}
    assert {(result.dataset_type, result.dataset_split) for result in card.data.eval_results} == {
        ("ILSVRC/imagenet-1k", "validation")
    }


def test_card_says_that_figures_are_of_samples(tmp_path: Path) -> None:
    figures = {"top1": 0.5, "top5": 0.9, "loss": 1.0, "images": 500}
    for name, sampled, expected in (
        ("whole", figures, "of ILSVRC/imagenet-1k, measured with"),
        (
            "sample",
            {**figures, "split_images": 50_000},
            "of ILSVRC/imagenet-1k (sample of 500 of 50,000 images), measured with",
        ),
    ):
        card = build_model_card(make_folder(tmp_path / name, {"base": sampled, "finetuned": sampled}))
        assert expected in card.text


def test_figures_of_other_images_are_left_out(tmp_path: Path) -> None:
    figures = {"top1": 0.5, "top5": 0.9, "loss": 1.0, "images": 500, "data": "aa", "split": "valid"}
    other = {**figures, "top1": 0.7654, "data": "bb"}
    text = build_model_card(make_folder(tmp_path, {"base": other, "pruned": figures, "finetuned": figures})).text
    assert "76.54" not in text and "Figures on other images are left out: base." in text
    assert "split `valid` of" in text


def test_settings_are_those_of_the_recipe(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit"))
    cut, finetuning = read_table(card.text, "## Pruning"), read_table(card.text, "## Finetuning")
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


def test_notes_of_the_plan_are_shown_without_paths(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "deit")
    assert "Notes of the plan" not in build_model_card(folder).text
    notes = ["left whole: 1 group (1: odd: stem)", "part: cannot be traced (in /home/me/net.py)"]
    (folder / "pruning_plan.json").write_text(json.dumps({"notes": notes}))
    text = build_model_card(folder).text
    assert "Notes of the plan:\n\n- left whole: 1 group (1: odd: stem)\n- not shown" in text
    assert "/home" not in text


def test_metadata_names_base_data_and_library(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", {"finetuned": {"top1": 0.5}}), repo="me/deit")
    data = yaml.safe_load(str(card).split("---")[1])
    assert data["license"] == "apache-2.0"  # as timm records it for these weights
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["isoprune", "isomorphic-pruning", "pruning", "timm"]
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "finetune")
    assert data["datasets"] == "ILSVRC/imagenet-1k"
    assert [entry["name"] for entry in data["model-index"]] == ["deit"]
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_card_without_metrics_shows_no_accuracy(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", stage="pruned"))
    table = read_table(card.text, "## Results")
    assert [row[:3] for row in table] == [
        ["model", "GMACs", "params (M)"],
        ["base", "4.61", "22.05"],
        ["pruned", "1.15", "8.82"],
    ]
    assert [row[3:] for row in table] == [["weights (MB)"], ["–"], ["7e-06"]]  # noqa: RUF001
    assert card.data.eval_results is None
    assert "top-1" not in str(card)
    assert "model-index" not in str(card)
    assert "The weights were not trained after pruning." in card.text
    assert "Accuracy was not measured, nor was robustness to other cameras" in card.text
    assert "LOCAL" not in card.text


def test_results_of_base_are_not_results_of_model(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", {"base": {"top1": 0.8}, "pruned": {"top1": 0.1}}))
    assert card.data.eval_results is None


def test_card_without_costs_and_recipe_invents_no_figure(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", cost=None, recipe=None, structure=None, id2label={}))
    assert [row[0] for row in read_table(card.text, "## Results")] == ["model", "base", "pruned", "finetuned"]
    assert "were removed" not in card.text
    assert "Calibration" not in card.text
    assert "classes." not in card.text.split("## Results")[0]
    assert "No data set was recorded." in card.text
    assert "the settings were not recorded" in card.text


def test_card_contains_no_local_path(tmp_path: Path) -> None:
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
    assert card.count("a local folder (photos)") >= 4
    assert "(LOCAL is a folder of the author)" in card and " LOCAL" in card
    assert "Accuracy was measured only on the data above" in card
    assert "\n`deit_small_patch16_224`, pruned with" in card
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
def test_base_model_is_pretrained_and_on_the_hub(tmp_path: Path, source: dict[str, Any]) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", source=source))
    assert card.data.base_model is None
    assert f"`{source['name']}`" in card.text
    assert ("random weights, drawn with seed 3" in card.text) is not source["pretrained"]


def test_relative_folder_is_not_taken_for_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "dense").mkdir(parents=True)
    card = build_model_card(make_folder(tmp_path / "deit", source={"name": "output/dense", "pretrained": True}))
    assert card.data.base_model is None
    assert "output/dense" not in str(card)


def test_card_of_pruned_model_claims_no_finetuning(tmp_path: Path) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", stage="pruned"))
    assert (card.data.base_model, card.data.base_model_relation) == (BASE, "finetune")  # other weights, for the Hub
    assert "The weights were not trained after pruning." in card.text and "epochs" not in card.text


@pytest.mark.parametrize("changes", [{"scope": "global"}, {"allocation": "knapsack"}, {"scopes": {"a": "b"}}, None])
def test_other_methods_are_not_called_isomorphic(tmp_path: Path, changes: dict[str, Any] | None) -> None:
    card = build_model_card(make_folder(tmp_path / "deit", recipe={"prune": changes} if changes else None))
    assert "pruned with structured pruning" in card.text and "arxiv.org" not in card.text.split("## Results")[0]
    assert "isomorphic-pruning" not in card.data.tags


def test_settings_of_plan_outrank_the_recipe(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "deit")
    settings = {"criterion": "gate_fisher_joint", "allocation": "knapsack", "sample": {"images": 1234}}
    (folder / "pruning_plan.json").write_text(json.dumps({"settings": settings}))
    text = build_model_card(folder).text
    assert "pruned with structured pruning (allocation `knapsack`)" in text
    assert "(criterion `gate_fisher_joint`)" in text and "For the scores 1,234 images of split `train`" in text


def test_labels_of_the_card_stay_whole(tmp_path: Path) -> None:
    labels = {"0": "hamster/gerbil cage", "1": "tiger, Panthera tigris", "2": "/m/01g317"}
    card = build_model_card(make_folder(tmp_path / "deit", id2label=labels))
    assert "Output: 3 classes: hamster/gerbil cage; tiger, Panthera tigris; /m/01g317." in card.text
    assert [entry["example_title"] for entry in card.data.widget] == ["Tiger"]
    assert card.data.widget[0]["src"].endswith("/tiger.jpg")


def test_card_knows_whether_it_was_edited(tmp_path: Path) -> None:
    card = str(build_model_card(make_folder(tmp_path / "deit")))
    assert is_unedited(card)
    assert not any(map(is_unedited, (card.replace("apache-2.0", "mit"), card + "mine", card[:-9], "mine", "")))


def test_own_weights_are_not_called_the_published_ones(tmp_path: Path) -> None:
    source = {"name": BASE, "pretrained": True, "weights": "/home/me/mine.pt"}
    card = build_model_card(make_folder(tmp_path / "deit", source=source), base_license=License("mit"))
    assert (card.data.base_model, card.data.license) == (None, None)
    assert f"weights of the author's own in the architecture `{BASE}`" in card.text


def test_license_of_a_base_on_the_hub(tmp_path: Path) -> None:
    source = {"name": "google/vit-base-patch16-224", "pretrained": True}
    folder = make_folder(tmp_path / "vit", source=source, base={"library": "transformers"})
    data = build_model_card(folder, base_license=License("other", "terms", "https://example.org/terms")).data
    assert (data.license, data.license_name, data.license_link) == ("other", "terms", "https://example.org/terms")


def test_leaderboards_take_whole_splits_only() -> None:
    config = {"recipe": {"data": {"dataset": "hf:own/data", "eval_split": "validation"}}}
    figures = {"top1": 0.81234, "images": 50_000, "split": "validation"}
    (entry,) = list_benchmark_entries(config, figures)
    assert (entry.dataset_id, entry.value) == ("own/data", 81.234)
    assert entry.notes == "top-1 accuracy in per cent on all 50,000 images of split validation, by isoprune_hf"
    for other in ({"split_images": 60_000}, {"split": "train[80%:]"}, {"top1": None}):
        assert list_benchmark_entries(config, figures | other) == []
    assert list_benchmark_entries({"recipe": {"data": {"dataset": "/home/me/data"}}}, figures) == []


def test_card_has_hashes_versions_snippets_and_citation(tmp_path: Path) -> None:
    text = build_model_card(make_folder(tmp_path / "deit"), repo="me/deit").text
    assert f"| model.safetensors | `{hashlib.sha256(b'weights').hexdigest()}` |" in text
    assert f"| pruning_plan.json | `{hashlib.sha256(b'{}').hexdigest()}` |" in text
    assert f"transformers {transformers_version}" in text
    assert 'pipeline("image-classification", model="me/deit", trust_remote_code=True)' in text
    assert "isoprune evaluate me/deit --data DIR" in text
    assert "arXiv:2407.04616" in text


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", None, "config.json"),
        ("config.json", "{", "config.json: .* JSON"),
        ("config.json", '{"model_type": "vit"}', "model_type 'vit'"),
        ("config.json", '{"model_type": "isoprune", "stage": "best"}', "stage 'best'"),
        ("metrics.json", "[]", "metrics.json: .* list"),
    ],
)
def test_damaged_folder_is_refused(tmp_path: Path, file: str, text: str | None, words: str) -> None:
    folder = make_folder(tmp_path / "deit")
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        build_model_card(folder)


NUMBER = re.compile(r"(?<![\w.-])\d(?:[\d,.]*\d)?(?:e-?\d+)?")
# Numbers of the template itself: the paper, the counter's unit, the sizes in words of the text, and the version of
# transformers that the shipped file needs.
FIXED = {"2024", "2407.04616", "256", "1", NEEDED}


def numbers_of(folder: Path, digests: bool = False) -> set[str]:
    text = str(build_model_card(folder))
    if not digests:
        text = re.sub(r"[0-9a-f]{40,}", "", text).split("Versions installed when this card was written")[0]
    return set(NUMBER.findall(text))


def test_every_number_comes_from_a_source(tmp_path: Path) -> None:
    """Cards of two folders without a common number share only the numbers of the template."""
    found = []
    for index in (3, 7):
        figures = {
            "top1": 0.01 * index + 0.5001,
            "top5": 0.01 * index + 0.9003,
            "loss": index + 0.1357,
            "images": index * 11117,
        }
        config = {
            "base": {"library": "timm", "architecture": "net", "args": {}},
            "source": {"name": "own/net", "pretrained": True, "seed": 90 + index},
            "structure": {"shapes": {}, "attributes": {}, "removed": [f"blocks.{n}" for n in range(index)]},
            "cost": {
                "base": {"macs": index * 4_608_338_304, "params": index * 22_050_664},
                "pruned": {"macs": index * 1_152_084_576 // index**2 * 2, "params": 8_820_266 * 3 // index},
            },
            "recipe": {
                "prune": {"ratio": 0.111 * index, "calibration_batches": 40 + index, "batch_size": 50 + index},
                "data": {
                    "dataset": "own/data",
                    "train_split": "train",
                    "eval_split": "test",
                    "revision": f"r{index}0",
                },
                "finetune": {"epochs": 600 + index, "learning_rate": index * 1.3e-4},
            },
            "image_size": [index, 20 + index, 150 + index],
            "id2label": {str(n): "name" for n in range(60 + index)},
        }
        folder = make_folder(tmp_path / "net", dict.fromkeys(("base", "pruned", "finetuned"), figures), **config)
        (folder / "model.safetensors").write_bytes(bytes(index * 12_345_000))
        times = {
            name: {"median": 70.5 + index, "low": 60.25 + index, "high": 80.75 + index} for name in ("base", "pruned")
        }
        row = {
            "runtime": "eager",
            "dtype": "fp32",
            "batch_size": 200 + index,
            "faster": 0.77 * index,
            "of_promised": 0.13 * index,
        }
        row |= {**times, "memory": {"base": index * 1_230_000, "pruned": index * 330_000}}
        benchmark = {
            "machine": {"device": f"chip {index}x", "threads": 40 * index, "versions": {"torch": f"{index}.{index}"}}
        }
        benchmark |= {"rows": [row], "promised": 0.59 * index, "reason": f"Because {900 + index}."}
        speed = {
            "milliseconds": dict.fromkeys(figures, index * 3.33),
            "device": f"unit {index}y",
            "threads": index,
        }
        speed = {**speed, "milliseconds": {"base": index * 3.33, "finetuned": index * 1.77}, "batch_size": 300 + index}
        (folder / "speed.json").write_text(json.dumps({**speed, "benchmark": benchmark}))
        found.append(numbers_of(folder))
        assert len(found[-1]) > 30
    assert (found[0] & found[1]) - FIXED == set()


def test_commands_reproduce_the_recipe(tmp_path: Path) -> None:
    text = build_model_card(make_folder(tmp_path / "deit")).text
    block = re.search(r"settings that differ from the defaults.*?```bash\n(.*?)\n```", text, re.DOTALL)[1]
    lines = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [line[0] for line in lines] == ["prune", "finetune"]
    _, cut = parse(lines[0])
    _, trained = parse([*lines[1], "--output", "out"])
    assert (cut.prune.model, cut.prune.ratio, cut.prune.scope, cut.prune.seed) == (BASE, 0.625, "isomorphic", 7)
    assert (cut.prune.calibration_batches, cut.prune.batch_size, cut.prune.head_dim_ratio) == (40, 32, None)
    assert (trained.data.dataset, trained.data.eval_split) == ("ILSVRC/imagenet-1k", "validation")
    assert (trained.finetune.epochs, trained.finetune.learning_rate) == (11, 0.0003)
    assert list(trained.finetune.crop_scale) == [0.2, 1.0]
    assert "prune" not in trained


def test_only_the_first_classes_are_named(tmp_path: Path) -> None:
    labels = {str(index): f"c{index}" for index in range(1234)}
    text = build_model_card(make_folder(tmp_path / "deit", id2label=labels)).text
    assert "Output: 1234 classes: c0, c1, " in text and "c18, c19 and 1,214 more, all in config.json." in text


def test_picture_is_shown_if_the_folder_has_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "deit")
    assert "widths.png" not in build_model_card(folder).text
    (folder / "widths.png").write_bytes(b"")
    assert "](widths.png)" in build_model_card(folder).text
    benchmark = {"machine": {"device": "cpu", "threads": 1, "versions": {}}, "promised": 2.0, "rows": [], "reason": ""}
    (folder / "speed.json").write_text(json.dumps({"benchmark": benchmark}))
    assert "speed.png" not in build_model_card(folder).text
    (folder / "speed.png").write_bytes(b"")
    assert "](speed.png)" in build_model_card(folder).text


def test_snippets_and_command_of_the_card_run(
    pruned: Callable[[str], Pruned], fresh_python: FreshPython, tmp_path: Path
) -> None:
    sample = pruned("vit")
    folder = shutil.copytree(sample.folder, tmp_path / "tiny")
    image = Image.effect_mandelbrot((61, 47), (-2, -1, 1, 1), 30).convert("RGB")
    image.save(tmp_path / "image.png")
    with torch.inference_mode():
        logits = sample.model(**sample.processor(image, return_tensors="pt")).logits[0]
    best = LABELS[int(logits.argmax())]
    text = build_model_card(folder).text
    alone, package, steps = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    last = 'classify("image.png")'
    shown = [snippet.replace(last, f"print({last}[0]['label'])") for snippet in (alone, package)]
    for code, absent in ((shown[0], ["isoprune_hf"]), (shown[1] + steps, [])):
        done = fresh_python.run(code, cwd=tmp_path, absent=absent)
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.split()) == {best}
    for color in ("ant", "bee", "cat", "dog", "eel", "fox", "gnu"):
        for split in ("train", "val"):
            (tmp_path / "data" / split / color).mkdir(parents=True)
            image.save(tmp_path / "data" / split / color / "image.png")
    line = (
        re.search(r"```bash\n(isoprune evaluate .*?)\n```", text)[1]
        .replace("DIR", "data")
        .replace("tiny", str(folder))
    )
    arguments = [str(tmp_path / "data") if word == "data" else word for word in shlex.split(line)[1:]]
    done = isoprune(*arguments)
    assert done.code == 0, done.err
    assert f" {100 / 7:.2f} " in done.out  # the same image in each of seven classes


def test_card_of_own_network_names_its_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"image": torch.randn(2, 3, 4, 5), "extra": torch.randn(2, 6)}
    result = prune(TwoInputs(8), [batch], inputs=["image", "extra"], criterion="l1", ratio=0.5, round_to=2)
    result.save(tmp_path / "half", builder=TwoInputs, arguments={"width": 8})
    card = (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    assert "pipeline" not in card.replace("pipeline_tag", "") and "isoprune " not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert "trust_remote_code=True, builder=TwoInputs" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("trust_remote_code=True, ", ""), names)
    assert names["outputs"]["logits"].shape == (1, 4)
    config = json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))
    config["base"]["architecture"] = "os:x\nprint(1)"
    (tmp_path / "half" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "\nprint" not in str(build_model_card(tmp_path / "half"))
