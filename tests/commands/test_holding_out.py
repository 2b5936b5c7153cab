"""Every stage holds out the same images of a data set without a split for evaluation, and says so."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import isoprune, read
from helpers.imagenet_cut import VIT, offline_on_cpu
from PIL import Image

from isoprune_hf.commands.steps import finetuning
from isoprune_hf.commands.steps.holding_out import settle_holdout
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.recipes import DataRecipe

SAID = "4 of 40 training images, held out by seed 0"


@pytest.fixture(scope="module", autouse=True)
def offline_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with offline_on_cpu(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return class folders without splits: 20 images of noise for each of 2 classes."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(40):
        place = root / "ab"[number // 20] / f"{number:02}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place)
    return root


def run(*arguments: str | Path) -> str:
    done = isoprune(*arguments)
    assert done.code == 0, done.err
    return done.out + done.err


@pytest.fixture(scope="module")
def pruned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("pruned") / "pruned"
    return folder, run(
        "prune", *VIT, "--num-labels", "data", "--criterion", "l1", "--data", images, "--output", folder
    )


def test_table_metrics_and_card_say_it(pruned: tuple[Path, str]) -> None:
    folder, printed = pruned
    figures, card = read(folder, "metrics.json"), (folder / "README.md").read_text(encoding="utf-8")
    for row in figures.values():
        assert [row[name] for name in ("images", "split_images", "holdout_seed", "split")] == [4, 40, 0, "all"]
    assert SAID in printed and "4 of 40 training images are held out" in printed
    assert SAID in card and "without the images that are held out for evaluation" in card
    assert "split: all (held out)" in card


def test_stages_evaluate_on_the_same_images(pruned: tuple[Path, str], images: Path, tmp_path: Path) -> None:
    expected = read(pruned[0], "metrics.json")["pruned"]
    printed = run("evaluate", pruned[0], "--data", images, "--json")
    found = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    run("finetune", pruned[0], "--data", images, "--epochs", "1", "--output", tmp_path / "out")
    tuned = read(tmp_path / "out", "metrics.json")
    assert tuned["pruned"] == expected and tuned["finetuned"]["data"] == expected["data"]


def test_base_of_a_second_cut_is_dense(pruned: tuple[Path, str], images: Path, tmp_path: Path) -> None:
    """Its row has the costs of the dense base, so it has the figures of that one, not those of the first cut."""
    first = read(pruned[0], "metrics.json")
    assert first["base"]["loss"] != first["pruned"]["loss"]
    cut = ["--criterion", "l1", "--target-macs", "70%", "--data", images, "--output", tmp_path / "out"]
    printed = run("prune", pruned[0], *cut)
    second = read(tmp_path / "out", "metrics.json")
    assert second["base"] == pytest.approx(first["base"])
    assert f"the model before this cut: top1 {100 * first['pruned']['top1']:.2f}%" in printed


def test_another_share_is_seen(pruned: tuple[Path, str], images: Path) -> None:
    for share in ("0", "0.3"):
        printed = run("evaluate", pruned[0], "--data", images, "--holdout", share)
        assert "figures are too good" in printed and "not stored in the folder" in printed
    assert read(pruned[0], "metrics.json")["pruned"]["images"] == 4


def test_folder_without_a_record_may_have_seen(pruned: tuple[Path, str], images: Path, tmp_path: Path) -> None:
    """Earlier versions held nothing out, and recorded no share."""
    folder = tmp_path / "old"
    shutil.copytree(pruned[0], folder)
    config = read(folder, "config.json")
    del config["recipe"]["data"]["holdout"]

    def said(*flags: str, **prune: object) -> int:
        config["recipe"]["prune"] |= prune
        (folder / "config.json").write_text(json.dumps(config))
        return run("evaluate", folder, "--data", images, *flags).count("does not record which images")

    assert said(criterion="l1", rotate=False, reconstruct="none") == 0  # it was only evaluated on them
    assert said(criterion="taylor") == said("--holdout", "0.2") == 1
    assert said(criterion="l1", reconstruct="bn") == 1
    config["recipe"]["data"]["dataset"] = "other"
    assert said() == 0
    assert "does not record" not in run("evaluate", pruned[0], "--data", images)


def test_base_is_evaluated_on_all_images(images: Path) -> None:
    model, other = VIT[1], ["--pretrained", "false", "--num-labels", "data", "--model-args", VIT[5]]
    printed = run("evaluate", model, *other, "--data", images)
    assert "on 40 images" in printed and "held out" not in printed


def test_share_of_the_folder_is_the_default(tmp_path: Path, images: Path) -> None:
    config = {"model_type": "isoprune", "recipe": {"data": {"dataset": "d", "holdout": 0.2}}}
    data = DataRecipe(dataset="d")

    def share(**changes: object) -> float | None:
        (tmp_path / "config.json").write_text(json.dumps(config | {"recipe": {"data": changes}}))
        return settle_holdout(data, str(tmp_path), otherwise=0.5).holdout

    assert share(dataset="d", holdout=0.2) == 0.2
    assert share(dataset="d", holdout=0.2, streaming=True) == 0
    assert share(dataset="d", holdout=None) is None  # the default share
    assert share(dataset="d") == share(dataset="e", holdout=0.2) == 0.5
    with pytest.raises(RecipeError, match=r"data\.holdout"):
        share(dataset="d", holdout=7)
    assert settle_holdout(DataRecipe("d", holdout=0.3), str(tmp_path)).holdout == 0.3
    assert settle_holdout(data, None) == data


@pytest.mark.families
def test_run_begun_without_holding_out(
    pruned: tuple[Path, str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions held nothing out: their runs have the identity of a share of 0."""
    command = ["finetune", pruned[0], "--data", images, "--epochs", "1", "--output", tmp_path / "out"]

    def fail(*arguments: object) -> None:
        raise CheckpointError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "write_folder", fail)
        assert "the training is saved" in isoprune(*command, "--holdout", "0").err
    refused = isoprune(*command)
    assert refused.code == 2 and "data.holdout was not set, got 0.1" in refused.err
    run(*command, "--holdout", "0")
    assert "finetuned" not in read(tmp_path / "out", "metrics.json")
