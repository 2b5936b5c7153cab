"""The command line prunes and measures an encoder without a head, and refuses stages that need classes in one line."""

import json
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


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "pruned", "--data", "images"],
        ["evaluate", "pruned", "--data", "images", "--per_class", "classes.csv"],
        ["export", "pruned"],
        ["benchmark", "pruned"],
        ["run", "encoder", "--target-macs", "60%", "--data", "images"],
        ["frontier", "encoder", "--data", "images"],
        ["prune", "encoder", "--target-macs", "60%", "--data", "images", "--prune.layout", "uniform"],
        ["prune", "encoder", "--ratio", "0.5", "--data", "images", "--prune.preset", "reference"],
    ],
    ids=lambda words: words[0],
)
def test_other_stages_refuse_in_one_line(words: list[str], place: Path, tmp_path: Path) -> None:
    output = [] if words[0] in ("evaluate", "benchmark") else ["--output", tmp_path / "out"]
    named = [place / word if word in ("encoder", "pruned", "images") else word for word in words]
    done = isoprune(*named, *output)
    line = done.err.strip().splitlines()[-1]
    assert done.code == 2 and line.startswith("isoprune: error: ") and not (tmp_path / "out").exists()
