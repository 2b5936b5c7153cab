"""The command line prunes and measures an encoder without a head, and refuses stages that need classes in one line."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers.command_line import isoprune, succeed
from helpers.stage_commands import write_four_classes
from transformers import AutoModel

TOWER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SCORED = ["--prune.round_to", "1", "--prune.criterion", "gate_fisher"]
CUT = ["--target-macs", "60%", *SCORED]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an encoder, images, and the pruned encoder."""
    place = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)).save_pretrained(place / "encoder")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(place / "encoder")
    write_four_classes(place / "images")
    printed = succeed("prune", place / "encoder", *CUT, "--data", place / "images", "--output", place / "pruned")
    assert "extract = pipeline(" in printed and "cosine" in printed
    return place


def test_figures_are_those_of_both_networks(place: Path) -> None:
    metrics = json.loads((place / "pruned" / "metrics.json").read_text())
    assert set(metrics["base"]) == {"images", "knn", "data", "split"}
    dense, cut = (
        AutoModel.from_pretrained(place / "encoder").eval(),
        AutoModel.from_pretrained(place / "pruned").eval(),
    )
    processor = transformers.AutoImageProcessor.from_pretrained(place / "pruned")
    files = sorted((place / "images" / "val").rglob("*.png"))
    images = [transformers.image_utils.load_image(str(file)) for file in files]
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        first, second = dense(pixels), cut(pixels)
    cosine = torch.nn.functional.cosine_similarity
    pooled = cosine(first.pooler_output.double(), second.pooler_output.double()).mean()
    tokens = cosine(first.last_hidden_state.double(), second.last_hidden_state.double(), dim=-1).mean()
    assert metrics["pruned"]["cosine"] == pytest.approx(float(pooled), abs=1e-6)
    assert metrics["pruned"]["position_cosine"] == pytest.approx(float(tokens), abs=1e-6)
    assert metrics["pruned"]["images"] == 4 and metrics["pruned"]["cosine"] > 0.9


def test_evaluation_repeats_the_figures(place: Path) -> None:
    before = json.loads((place / "pruned" / "metrics.json").read_text())["pruned"]
    succeed("evaluate", place / "pruned", "--data", place / "images")
    assert json.loads((place / "pruned" / "metrics.json").read_text())["pruned"] == before


def test_doctor_finds_the_folder_sound(place: Path) -> None:
    printed = succeed("doctor", place / "pruned")
    assert "FAIL" not in printed and "save-load" in printed


def test_scores_of_features_make_the_same_cut(place: Path, tmp_path: Path) -> None:
    file, images = tmp_path / "scores.safetensors", place / "images"
    succeed("score", place / "encoder", "--data", images, "--output", file, *SCORED)
    out = tmp_path / "out"
    succeed("prune", place / "encoder", *CUT, "--data", images, "--scores", file, "--output", out)
    plans = [json.loads((folder / "pruning_plan.json").read_text()) for folder in (place / "pruned", out)]
    assert plans[0]["kept"] == plans[1]["kept"]


def test_finetuning_measures_features_between_epochs(place: Path, tmp_path: Path) -> None:
    images, out = place / "images", tmp_path / "out"
    trained = ["--finetune.epochs", "2", "--finetune.batch_size", "8", "--finetune.learning_rate", "1e-4"]
    printed = succeed("finetune", place / "pruned", "--data", images, "--output", out, *trained)
    assert "finetuned" in printed and "cosine" in printed
    lines = (out / "checkpoints" / "training" / "log.jsonl").read_text().splitlines()
    epochs = [entry for entry in map(json.loads, lines) if "update" not in entry]
    assert [entry["epoch"] for entry in epochs] == [0, 1, 2] and all("knn" in entry for entry in epochs)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["finetuned"]["cosine"] == epochs[-1]["cosine"]
    assert metrics["pruned"] == json.loads((place / "pruned" / "metrics.json").read_text())["pruned"]
    succeed("evaluate", out, "--data", images)  # the same figures by another road
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_images_need_no_classes(place: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for file in (place / "images" / split).rglob("*.png"):
            shutil.copy(file, tmp_path / "flat" / split / f"{file.parent.name}-{file.name}")
    words = [*CUT, "--data", tmp_path / "flat", "--output", tmp_path / "out"]
    assert "k-NN" not in succeed("prune", place / "encoder", *words)
    known, found = (
        json.loads((folder / "metrics.json").read_text()) for folder in (place / "pruned", tmp_path / "out")
    )
    assert found["pruned"]["cosine"] == pytest.approx(known["pruned"]["cosine"], rel=1e-6)
    assert "knn" not in found["pruned"]


@pytest.mark.families
def test_run_tries_the_pipeline_of_features(place: Path, tmp_path: Path) -> None:
    out, trained = tmp_path / "out", ["--finetune.epochs", "1", "--finetune.batch_size", "8"]
    printed = succeed("run", place / "encoder", *CUT, "--data", place / "images", "--output", out, *trained)
    assert "pipeline on a held-out image: features of the shape [1, 17, 32]" in printed
    metrics = json.loads((out / "model" / "metrics.json").read_text())
    known = json.loads((place / "pruned" / "metrics.json").read_text())
    assert metrics["pruned"] == known["pruned"] and metrics["base"] == known["base"]
    assert metrics["finetuned"]["cosine"] > 0.9
    assert type(AutoModel.from_pretrained(out / "model")).__name__ == "IsoPruneModel"


@pytest.mark.faults
def test_frontier_compares_features_with_the_base(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scored = [*SCORED, "--sizes", "80%,60%", "--data", place / "images"]
    succeed("frontier", place / "encoder", *scored, "--output", out)
    base, large, small = csv.DictReader((out / "frontier.csv").read_text().splitlines())
    assert base["cosine"] == "" and 1 > float(large["cosine"]) > float(small["cosine"]) > 0.9
    assert float(small["cosine"]) == json.loads((place / "pruned" / "metrics.json").read_text())["pruned"]["cosine"]
    assert "cosine before finetuning" in (out / "frontier.svg").read_text()


def test_teacher_needs_outputs_of_equal_shapes(place: Path, tmp_path: Path) -> None:
    other = transformers.Dinov2Model(transformers.Dinov2Config(**{**TOWER, "hidden_size": 16}))
    other.save_pretrained(tmp_path / "other")
    transformers.AutoImageProcessor.from_pretrained(place / "encoder").save_pretrained(tmp_path / "other")
    words = ["--finetune.teacher", tmp_path / "other", "--output", tmp_path / "out"]
    done = isoprune("finetune", place / "pruned", "--data", place / "images", *words)
    assert done.code == 2 and "shapes [[17, 16], [16]], those of the student [[17, 32], [32]]" in done.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["evaluate", "pruned", "--per_class", "classes.csv"], "--per_class is for a classifier"),
        (["finetune", "pruned", "--finetune.distillation", "hard"], "hard is for classes"),
        (["finetune", "pruned", "--finetune.teacher", "none"], "learns from a teacher alone"),
        (["finetune", "pruned", "--num_labels", "data"], "is of the task image-feature-extraction"),
        (["run", "encoder", "--target-macs", "60%", "--pretrain.epochs", "1"], "pretrain.epochs 1"),
        (["run", "encoder", "--target-macs", "60%", "--prune.pretrained", "false"], "learns from a teacher alone"),
        (
            ["prune", "encoder", "--target-macs", "60%", "--prune.layout", "uniform"],
            "uniform is for image classifiers",
        ),
        (["prune", "encoder", "--ratio", "0.5", "--prune.preset", "reference"], "reference is for image classifiers"),
    ],
    ids=lambda words: words[-2] if isinstance(words, list) else None,
)
def test_settings_of_classes_are_refused_at_once(words: list[str], text: str, place: Path, tmp_path: Path) -> None:
    output = [] if words[0] == "evaluate" else ["--output", tmp_path / "out"]
    named = [place / word if word in ("encoder", "pruned") else word for word in words]
    done = isoprune(*named, "--data", place / "images", *output)
    line = done.err.strip().splitlines()[-1]
    assert done.code == 2 and line.startswith("isoprune: error: ") and text in line
    assert "score on" not in done.err and not (tmp_path / "out").exists()


@pytest.mark.families
def test_benchmark_times_the_network_of_features(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "pruned", tmp_path / "pruned")
    words = ["--batch_sizes", "[1]", "--dtypes", '["fp32"]', "--runtimes", '["eager"]', "--repeats", "5"]
    assert "eager" in succeed("benchmark", folder, *words)
    assert "benchmark" in json.loads((folder / "speed.json").read_text())
