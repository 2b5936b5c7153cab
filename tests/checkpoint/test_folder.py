"""Folders are written whole or not at all, and open without the package."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fresh_python import FreshPython
from helpers.pruned_models import LABELS, SAVED, Pruned
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from isoprune_hf.checkpoint.folder import read_json, replace_file, save_model_folder, write_file
from isoprune_hf.errors import CheckpointError, RecipeError

MODEL_FILES = {"config.json", "model.safetensors", "modeling_isoprune.py", "preprocessor_config.json"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- written whole or not at all


def test_new_folder_contains_all_files(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    metrics = {"pruned": {"top1": 0.5, "images": 8}, "base": {"top1": 0.75}}
    save_model_folder(tmp_path / "a" / "b", sample.model, sample.processor, plan='{"kept": {}}\n', metrics=metrics)
    folder = tmp_path / "a" / "b"
    assert names(folder) == MODEL_FILES | {"pruning_plan.json", "metrics.json"}
    assert names(tmp_path / "a") == {"b"}
    assert (folder / "pruning_plan.json").read_text() == '{"kept": {}}\n'
    expected = '{\n  "base": {\n    "top1": 0.75\n  },\n  "pruned": {\n    "images": 8,\n    "top1": 0.5\n  }\n}\n'
    assert (folder / "metrics.json").read_text() == expected
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_plan_and_metrics_are_optional_files(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    save_model_folder(tmp_path / "plain", sample.model, sample.processor)
    assert names(tmp_path / "plain") == MODEL_FILES


def test_shipped_code_does_not_import_the_package(pruned) -> None:
    code = (pruned("vit").folder / "modeling_isoprune.py").read_text()
    assert not [line for line in code.splitlines() if "import" in line.split() and "isoprune" in line]


def test_result_saves_its_plan_in_the_folder(pruned) -> None:
    folder = pruned("vit").folder
    assert names(folder) == MODEL_FILES | {"pruning_plan.json"}
    assert json.loads((folder / "pruning_plan.json").read_text())["version"] == 1


def test_old_folder_is_replaced_entirely(pruned, tmp_path: Path, monkeypatch) -> None:
    sample = pruned("vit")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    for name in ("old.txt", "config.json"):
        (tmp_path / "out" / name).write_text("old")
    monkeypatch.chdir(tmp_path)
    save_model_folder("out", sample.model, sample.processor)
    assert names(tmp_path / "out") == MODEL_FILES
    assert names(tmp_path) == {"out"}


def test_folder_of_other_files_is_not_replaced(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match=f"^folder {tmp_path} "):
        save_model_folder(tmp_path, sample.model, sample.processor)
    assert content(tmp_path) == {"thesis.tex": b"x"}


def test_kept_subfolder_survives_replacement(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    out = tmp_path / "out"
    (out / "checkpoints" / "1").mkdir(parents=True)
    (out / "checkpoints" / "1" / "state").write_text("kept")
    (out / "old.txt").write_text("old")
    save_model_folder(out, sample.model, sample.processor, keep="checkpoints")
    assert names(out) == MODEL_FILES | {"checkpoints"}
    assert (out / "checkpoints" / "1" / "state").read_text() == "kept"


def test_missing_kept_subfolder_is_no_error(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    for _ in range(2):
        save_model_folder(tmp_path / "out", sample.model, sample.processor, keep="checkpoints")
        assert names(tmp_path / "out") == MODEL_FILES


def test_finish_writes_before_the_folder_is_renamed(pruned, tmp_path: Path) -> None:
    sample, out = pruned("vit"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")

    def finish(folder: Path) -> None:
        assert names(folder) == MODEL_FILES and (out / "config.json").read_text() == "old"
        (folder / "README.md").write_text("card")

    save_model_folder(out, sample.model, sample.processor, finish=finish)
    assert names(out) == MODEL_FILES | {"README.md"}


class BrokenProcessor:
    def __init__(self, error: Exception):
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "preprocessor_config.json").write_text("{")
        raise self.error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no processor")])
@pytest.mark.parametrize("before", ["nothing", "a folder"])
def test_failed_write_leaves_the_old_folder(before: str, error: Exception, pruned, tmp_path) -> None:
    out = tmp_path / "out"
    if before == "a folder":
        (out / "checkpoints").mkdir(parents=True)
        (out / "checkpoints" / "state").write_text("kept")
        (out / "config.json").write_text("old")
    held = content(tmp_path)
    expected = CheckpointError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected) as caught:
        save_model_folder(out, pruned("vit").model, BrokenProcessor(error), keep="checkpoints")
    if isinstance(error, OSError):
        assert "\n" not in str(caught.value) and str(out) in str(caught.value) and "No space left" in str(caught.value)
    assert content(tmp_path) == held
    assert names(tmp_path) == ({"out"} if before == "a folder" else set())


def test_folder_below_a_file_is_refused(pruned, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"file/out cannot be written"):
        save_model_folder(tmp_path / "file" / "out", pruned("vit").model, pruned("vit").processor)
    assert names(tmp_path) == {"file"}


# --- single files


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    for text in ("old and long", "new\n"):
        write_file(path, text)
        assert path.read_text() == text and names(path.parent) == {"metrics.json"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_failed_sync_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=f"^{path} .*Input/output error"):
        write_file(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == {"metrics.json"}


def test_failed_writer_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise ValueError("no scores")

    with pytest.raises(ValueError, match="no scores"):
        replace_file(path, write)
    assert path.read_text() == "old" and names(tmp_path) == {"scores.safetensors"}


def test_missing_json_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"a": {"b": 1}}')
    assert read_json(tmp_path, "metrics.json") == {"a": {"b": 1}}
    assert read_json(str(tmp_path), "nosuch.json") is None
    assert read_json(tmp_path / "nosuch", "metrics.json") is None


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'"x"', b"3", b"null", b"\xff\xfe\x00"])
def test_file_without_json_object_is_refused_by_name(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path, "metrics.json")
    assert str(caught.value).startswith(f"{tmp_path}/metrics.json: ") and "\n" not in str(caught.value)


# --- opened by pipeline


def make_picture(path: Path) -> Path:
    rng = np.random.default_rng(5)
    Image.fromarray(rng.integers(0, 256, (61, 90, 3), dtype=np.uint8)).save(path)
    return path


def scores_by_hand(sample: Pruned, picture: Path) -> dict[str, float]:
    pixels = sample.processor(Image.open(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        exponentials = sample.model(pixels).logits[0].double().exp()
    return dict(zip(LABELS.values(), (exponentials / exponentials.sum()).tolist(), strict=True))


@pytest.mark.parametrize("family", ["vit", "swin", "mobilenet_v2", "hf-vit"])
def test_pipeline_scores_equal_those_by_hand(family: str, pruned, tmp_path: Path) -> None:
    sample, picture = pruned(family), make_picture(tmp_path / "picture.png")
    answers = pipeline("image-classification", model=str(sample.folder))(str(picture), top_k=7)
    expected = scores_by_hand(sample, picture)
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(expected, abs=1e-6)
    assert answers[0]["label"] == max(expected, key=expected.get)


# --- opened where nothing of ours is installed

OPEN_ELSEWHERE = """
import importlib, json, sys

ABSENT, answers = ("isoprune_hf", "torch_pruning"), {"absent": []}
for name in ABSENT:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        answers["absent"].append(name)

import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

def refusal(open_it):
    try:
        open_it()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

def difference(folder, tensors):
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(tensors["images"]).logits
    return model, (logits - tensors["logits"]).abs().max().item()

root = Path(sys.argv[1])
for folder in sorted(path for path in (root / "folders").iterdir()):
    answer = answers[folder.name] = {}
    answer["refused"] = [
        refusal(lambda: AutoModelForImageClassification.from_pretrained(folder)),
        refusal(lambda: AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)),
        refusal(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False)),
        refusal(lambda: pipeline("image-classification", model=str(folder), trust_remote_code=False)),
    ]
    tensors = load_file(root / "expected" / f"{folder.name}.safetensors")
    model, answer["difference"] = difference(folder, tensors)
    answer["module"], answer["training"] = type(model).__module__, model.training
    wrong = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, tensors[name])]
    answer["wrong buffers"] = wrong
    model.save_pretrained(root / "again" / folder.name)
    _, answer["again"] = difference(root / "again" / folder.name, tensors)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    answer["processor"] = type(processor).__name__
    processor.save_pretrained(root / "again" / folder.name)
    classify = pipeline("image-classification", model=str(folder), trust_remote_code=True)
    answer["pipeline"] = classify(str(root / "picture.png"), top_k=7)
answers["loaded"] = [name for name, module in sys.modules.items() if module and name.partition(".")[0] in ABSENT]
(root / "answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def elsewhere(
    request: pytest.FixtureRequest, pruned, fresh_python: FreshPython, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Open copies of the folders in one process that cannot import the package, and return its findings."""
    asking = [item for item in request.session.items if "elsewhere" in getattr(item, "fixturenames", ())]
    families = {item.callspec.params["family"] for item in asking if hasattr(item, "callspec")}
    root = tmp_path_factory.mktemp("elsewhere")
    (root / "expected").mkdir()
    make_picture(root / "picture.png")
    for family in sorted(families):
        sample = pruned(family)
        shutil.copytree(sample.folder, root / "folders" / family)
        buffers = {name: tensor.clone() for name, tensor in sample.model.named_buffers()}
        expected = {"images": sample.images, "logits": sample.logits, **buffers}
        save_file(expected, root / "expected" / f"{family}.safetensors")
    done = fresh_python.run(OPEN_ELSEWHERE, root, cwd=root, absent=["isoprune_hf", "torch_pruning"])
    assert done.returncode == 0, done.stderr
    return json.loads((root / "answers.json").read_text()), root


def test_package_is_absent_in_the_other_process(elsewhere) -> None:
    answers, _ = elsewhere
    assert answers["absent"] == ["isoprune_hf", "torch_pruning"]
    assert answers["loaded"] == []


@pytest.mark.parametrize("family", SAVED)
def test_logits_without_package_are_bit_equal(family: str, elsewhere) -> None:
    answer = elsewhere[0][family]
    assert answer["difference"] == 0.0
    assert answer["wrong buffers"] == [] and answer["training"] is False
    assert answer["module"].startswith("transformers_modules.")


@pytest.mark.parametrize("family", SAVED)
def test_pipeline_without_package_gives_the_same_scores(family: str, elsewhere, pruned) -> None:
    answers, root = elsewhere
    assert answers[family]["processor"] == type(pruned(family).processor).__name__
    expected = scores_by_hand(pruned(family), root / "picture.png")
    found = {answer["label"]: answer["score"] for answer in answers[family]["pipeline"]}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", SAVED)
def test_folder_is_refused_without_trusted_code(family: str, elsewhere) -> None:
    refusals = elsewhere[0][family]["refused"]
    assert len(refusals) == 4
    assert all(refusal is not None and "trust_remote_code=True" in refusal for refusal in refusals)


@pytest.mark.parametrize("family", SAVED)
def test_model_saved_without_package_opens_with_it(family: str, elsewhere, pruned) -> None:
    answers, root = elsewhere
    assert answers[family]["again"] == 0.0
    sample = pruned(family)
    model = AutoModelForImageClassification.from_pretrained(root / "again" / family)
    with torch.no_grad():
        assert torch.equal(model(sample.images).logits, sample.logits)


@pytest.mark.parametrize("family", SAVED)
def test_processor_saved_without_package_keeps_its_pixels(family: str, elsewhere, pruned) -> None:
    _, root = elsewhere
    processor = AutoImageProcessor.from_pretrained(root / "again" / family)
    assert type(processor) is type(pruned(family).processor)
    picture = Image.open(root / "picture.png")
    pixels = [p(picture, return_tensors="pt").pixel_values for p in (processor, pruned(family).processor)]
    assert torch.equal(*pixels)
