"""The stage evaluate: any model, its own transform or another, and the figures that its folder stores."""

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import contents, isoprune, read, refuse, succeed
from helpers.evaluation import calibration_error_by_hand, numbers_of
from helpers.imagenet import SYNSETS
from helpers.imagenet_cut import MODEL_ARGS, offline_on_cpu
from helpers.imagenet_cut import VIT as UNTRAINED
from helpers.plain_cut import PLAIN_FLAGS
from helpers.reference_files import make_module, save
from helpers.tiny_models import TRANSFORMERS
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessor

VIT = [*UNTRAINED, "--prune.num_labels", "data"]
OTHER = ["--data.resize", "22", "--data.interpolation", "bilinear"]


@pytest.fixture(scope="module", autouse=True)
def offline_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with offline_on_cpu(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parent of data/imagenet: noise of 10 classes, 2 images each in train and val, written last class first."""
    root, generator = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in reversed(SYNSETS):
            folder = root / "data" / "imagenet" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                noise = generator.integers(0, 256, (24, 31, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{name}_{number}.JPEG")
    return root


@pytest.fixture(scope="module")
def images(place: Path) -> Path:
    return place / "data" / "imagenet"


@pytest.fixture(scope="module")
def pruned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny ViT that was cut and evaluated with its own transform."""
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    succeed("prune", *VIT, "--prune.criterion", "l1", "--data.dataset", images, "--output", folder)
    return folder


def by_hand(
    model: nn.Module, images: Path, resize: int, interpolation: str, classes: Sequence[str] = SYNSETS
) -> dict[str, float]:
    """Classify the files of val/ one by one with torchvision's transform; labels by sorted synset."""
    normal = Normalize((0.5,) * 3, (0.5,) * 3)
    transform = Compose([Resize(resize, InterpolationMode(interpolation)), CenterCrop(16), ToTensor(), normal])
    ranks, losses, confidences = [], [], []
    for name in classes:
        label = SYNSETS.index(name)
        for file in sorted((images / "val" / name).iterdir()):
            with torch.no_grad():
                logits = model.eval()(transform(Image.open(file))[None]).logits[0]
            confidences.append(float(logits.softmax(dim=0).max()))
            ranks.append(int((logits > logits[label]).sum()))
            losses.append(float(nn.functional.cross_entropy(logits, torch.tensor(label))))
    share = {f"top{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)}
    share["ece"] = calibration_error_by_hand(confidences, [rank == 0 for rank in ranks])
    return {**share, "loss": sum(losses) / len(losses), "images": len(ranks)}


def open_folder(folder: Path) -> nn.Module:
    return AutoModelForImageClassification.from_pretrained(folder)


def measure(*arguments: str | Path) -> str:
    """Run evaluate, and return its log and its figures as JSON."""
    done = isoprune("evaluate", *arguments, "--json")
    assert done.code == 0, done.err
    return done.err + done.out


def figures_of(printed: str) -> dict[str, float]:
    figures = json.loads(printed[printed.index("{\n") :])
    return {name: value for name, value in numbers_of(figures).items() if name not in ("model", "macs", "params")}


@pytest.mark.families
def test_own_transform_is_default(pruned: Path, images: Path) -> None:
    # timm's data config of an untrained ViT of 16 pixels: the shorter side becomes 16, bicubic.
    printed = measure("--model", pruned, "--data.dataset", images)
    assert figures_of(printed) == pytest.approx(by_hand(open_folder(pruned), images, 16, "bicubic"), rel=1e-5)
    assert "transform: the model's own" in printed
    same = measure(
        *("--model", pruned, "--data.dataset", images),
        *("--data.resize", "16", "--data.interpolation", "bicubic"),
    )
    assert same == printed


def test_per_class_figures_are_written(pruned: Path, images: Path, tmp_path: Path) -> None:
    command = ("--model", pruned, "--data.dataset", images, "--per_class", tmp_path / "a" / "classes.csv")
    figures = figures_of(measure(*command))
    rows = list(csv.DictReader((tmp_path / "a" / "classes.csv").open()))
    assert [row["name"] for row in rows] == list(SYNSETS)
    weights = [int(row["images"]) for row in rows]
    for name in ("top1", "loss"):
        values = [float(row[name]) for row in rows]
        assert np.average(values, weights=weights) == pytest.approx(figures[name])
    assert f"--per_class {tmp_path} is a folder" in refuse("evaluate", *command[:-1], tmp_path)
    before = contents(pruned)
    assert "is not a table of this command" in refuse("evaluate", *command[:-1], pruned / "config.json")
    assert contents(pruned) == before
    (tmp_path / "empty.csv").touch()
    succeed("evaluate", *command[:-1], tmp_path / "empty.csv")
    assert (tmp_path / "empty.csv").read_text() == (tmp_path / "a" / "classes.csv").read_text()


def test_figures_of_other_transform_are_not_stored(pruned: Path, images: Path) -> None:
    before = contents(pruned)
    printed = measure("--model", pruned, "--data.dataset", images, *OTHER)
    assert figures_of(printed) == pytest.approx(by_hand(open_folder(pruned), images, 22, "bilinear"), rel=1e-5)
    assert "on 20 images, transform: resize 22, interpolation bilinear\n" in printed
    assert "figures are not stored in the folder: they were measured with another transform\n" in printed
    assert contents(pruned) == before


def test_figures_of_other_data_set_are_not_stored(pruned: Path, images: Path, tmp_path: Path) -> None:
    other, before = shutil.copytree(images, tmp_path / "other"), contents(pruned)
    assert "they were measured with another data set\n" in succeed(
        "evaluate", "--model", pruned, "--data.dataset", other
    )
    assert contents(pruned) == before


@pytest.mark.families
def test_folder_has_transform_of_its_figures(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("prune", *VIT, "--prune.criterion", "l1", "--data.dataset", images, *OTHER, "--output", out)
    saved = read(out, "preprocessor_config.json")
    assert (saved["size"], saved["resample"]) == ({"shortest_edge": 22}, Image.Resampling.BILINEAR)
    want = by_hand(open_folder(out), images, 22, "bilinear")
    assert numbers_of(read(out, "metrics.json")["pruned"]) == pytest.approx(want, rel=1e-5)
    printed = measure("--model", out, "--data.dataset", images)
    assert figures_of(printed) == pytest.approx(want, rel=1e-5) and "the model's own" in printed


@pytest.mark.families
def test_finetuning_with_other_transform_measures_everything_again(pruned: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tuning = ["--data.dataset", images, "--finetune.epochs", "1", "--output", out]
    succeed("finetune", "--model", pruned, *OTHER, *tuning)
    metrics = read(out, "metrics.json")
    assert numbers_of(metrics["pruned"]) == pytest.approx(
        by_hand(open_folder(pruned), images, 22, "bilinear"), rel=1e-5
    )
    assert numbers_of(metrics["finetuned"]) == pytest.approx(
        by_hand(open_folder(out), images, 22, "bilinear"), rel=1e-5
    )
    assert metrics["base"]["loss"] != read(pruned, "metrics.json")["base"]["loss"]
    assert read(out, "preprocessor_config.json")["size"] == {"shortest_edge": 22}
    assert read(out / "checkpoints" / "best", "preprocessor_config.json")["size"] == {"shortest_edge": 22}


@pytest.mark.families
def test_scoring_may_have_its_own_interpolation(images: Path, tmp_path: Path) -> None:
    scoring = [*VIT, *PLAIN_FLAGS, "--prune.criterion", "taylor", "--prune.calibration_batches", "1"]
    scoring += ["--data.dataset", images]
    plans = {}
    for name, flags in {"own": [], "other": ["--prune.interpolation", "nearest"], "resize": OTHER[:2]}.items():
        succeed("prune", *scoring, *flags, "--output", tmp_path / name)
        plans[name] = read(tmp_path / name, "pruning_plan.json")
    samples = {name: plan["settings"]["sample"] for name, plan in plans.items()}
    assert "interpolation" not in samples["own"] and samples["other"]["interpolation"] == "nearest"
    assert samples["resize"]["resize"] == 22
    assert len({json.dumps(plan["margins"]) for plan in plans.values()}) == 3  # three sets of scores
    saved = {name: read(tmp_path / name, "preprocessor_config.json") for name in plans}
    assert saved["other"] == saved["own"] != saved["resize"]


@pytest.mark.families
def test_log_names_values_replaced_by_preset(images: Path, tmp_path: Path) -> None:
    given = ["--prune.preset", "reference", "--prune.calibration_batches", "1"]
    printed = succeed("prune", *VIT, *given, "--data.dataset", images, "--output", tmp_path / "out")
    assert printed.startswith(
        "prune.preset reference sets criterion taylor_reference, score_batchnorm False (not True), "
    )
    plain = [*VIT, "--prune.criterion", "l1", "--data.dataset", images, "--output", tmp_path / "plain"]
    assert "prune.preset" not in succeed("prune", *plain)


def test_imagenet_folder_is_labelled_by_sorted_synset(
    pruned: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    printed = measure("--model", pruned, "--data.dataset", "data/imagenet", *OTHER)
    want = by_hand(open_folder(pruned), place / "data/imagenet", 22, "bilinear")
    assert figures_of(printed) == pytest.approx(want, rel=1e-5)
    names = read(pruned, "config.json")["id2label"]
    assert [names[str(index)] for index in range(10)] == sorted(SYNSETS)


def test_untrained_timm_name_needs_no_network(images: Path) -> None:
    printed = measure(
        *("--model", "timm/vit_tiny_patch16_224", "--pretrained", "false"),
        *("--model_args", json.dumps(MODEL_ARGS)),
        *("--num_labels", "data", "--data.dataset", images),
    )
    # By hand: patches 3*16*32 + 32, class token and 17 positions of 32, two blocks (norms 2*64, qkv 3*32*32 + 96,
    # projection 32*32 + 32, MLP 2*32*128 + 128 + 32), the last norm 64, the head 32*10 + 10.
    params = 1568 + 32 + 17 * 32 + 2 * (128 + 3168 + 1056 + 8352) + 64 + 330
    assert f"Params: {params / 1e6:.4f} M\n" in printed
    assert figures_of(printed)["images"] == 20 and "keep" not in printed


def test_transformers_and_converted_models_are_evaluated(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TRANSFORMERS["hf-vit"].__class__(**{**TRANSFORMERS["hf-vit"].to_dict(), "num_labels": 10})
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "hf")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "hf")
    printed = measure("--model", tmp_path / "hf", "--data.dataset", images, *OTHER)
    assert figures_of(printed) == pytest.approx(by_hand(model, images, 22, "bilinear"), rel=1e-5)
    old, new = save(make_module("deit"), tmp_path / "old.pth"), tmp_path / "new"
    args = json.dumps({"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4})
    assert f"run `isoprune convert {old}`" in refuse("evaluate", "--model", old, "--data.dataset", images)
    succeed("convert", old, "--output", new, f"--model_args={args}")
    printed = measure("--model", new, "--data.dataset", images)
    assert [*map(numbers_of, read(new, "metrics.json").values())] == [figures_of(printed)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.resize", "15"], ["data.resize must be at least", "16 pixels, got 15"]),
        (["--data.resize", "0"], ["data.resize must be a whole number between 1 and 4096, got 0"]),
        (["--data.resize", "half"], ["data.resize", "half"]),
        (["--data.interpolation", "area"], ["data.interpolation", "area", "nearest", "bilinear", "bicubic"]),
        (["--pretrained", "false"], ["is pruned; random weights need a dense base"]),
    ],
)
def test_invalid_evaluation_is_one_line(flags: list[str], words: list[str], pruned: Path, images: Path) -> None:
    before = contents(pruned)
    line = refuse("evaluate", "--model", pruned, "--data.dataset", images, *flags)
    assert [word for word in words if word not in line] == [], line
    assert contents(pruned) == before


def test_figures_of_a_sample_say_so(images: Path, pruned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    shutil.copytree(pruned, folder)
    output = succeed("evaluate", "--model", folder, "--data.dataset", images, "--data.eval_images", "7")
    figures = read(folder, "metrics.json")
    assert (figures["pruned"]["images"], figures["pruned"]["split_images"]) == (7, 20)
    assert "split_images" not in figures["base"]
    assert "(sample of 7 of 20 images)" in output
    assert "(sample of 7 of 20 images)" in (folder / "README.md").read_text(encoding="utf-8")


def test_table_of_a_cut_names_its_sample(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    flags = ["--prune.criterion", "l1", "--data.dataset", images, "--data.eval_images", "5", "--output", folder]
    assert "Accuracy and loss (sample of 5 of 20 images)" in succeed("prune", *VIT, *flags)
    assert {row["split_images"] for row in read(folder, "metrics.json").values()} == {20}


def test_folder_of_some_classes_is_evaluated_whole(images: Path, pruned: Path, tmp_path: Path) -> None:
    for name in SYNSETS[3:6]:
        shutil.copytree(images / "val" / name, tmp_path / "some" / name)
    printed = measure("--model", pruned, "--data.dataset", tmp_path / "some")
    expected = by_hand(open_folder(pruned), images, 16, "bicubic", SYNSETS[3:6])
    assert figures_of(printed) == pytest.approx(expected, rel=1e-5)
    assert '"split": "all"' in printed


@pytest.mark.families
def test_finetuning_on_other_images_measures_everything_again(pruned: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tuning = ["--data.dataset", images, "--finetune.epochs", "1", "--output", out]
    succeed("finetune", "--model", pruned, "--data.eval_split", "val[:30%]", *tuning)
    metrics = read(out, "metrics.json")
    assert {(row["images"], row["split"]) for row in metrics.values()} == {(6, "val[:30%]")}
    assert len({row["data"] for row in metrics.values()}) == 1 and "pruned" in metrics


def test_model_with_nan_is_named_before_any_pass(pruned: Path, images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    teacher = ["--finetune.teacher", folder]
    for arguments in (
        ["evaluate", folder],
        ["finetune", folder, "--output", tmp_path / "out"],
        ["finetune", pruned, "--output", tmp_path / "out", *teacher],
    ):
        line = refuse(*arguments, "--data.dataset", images)
        assert "1 of 16 values of 'norm.bias' are not finite, the first is nan" in line
