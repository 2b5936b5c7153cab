"""The stage doctor: sound folders pass, and each fault is found."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.command_line import contents, isoprune, leftovers, read, succeed
from helpers.cut_folders import MODEL_ARGS, NAME, check_refused
from safetensors.torch import load_file, save_file
from torch import nn

from isoprune_hf.commands.doctor import STAGE
from isoprune_hf.commands.steps import checking
from isoprune_hf.models import load_base
from isoprune_hf.pruning.doctor import Finding


def verdicts(printed: str) -> dict[str, str]:
    return {check: verdict for verdict, check in re.findall(r"^(ok|FAIL|skip) +(\S+)", printed, re.MULTILINE)}


SOUND = dict.fromkeys(["load", "cost", "structure", "no-op", "save-load", "reach", "tensors"], "ok")


def test_sound_folder_passes_and_stays_untouched(folders: Path) -> None:
    before = contents(folders)
    printed = succeed("doctor", folders / "small")
    assert verdicts(printed) == SOUND
    assert printed.endswith(f"{folders}/small: no checks failed\n")
    assert re.search(r"^ {17}fixed: outputs of the network: head.weight, head.bias$", printed, re.MULTILINE)
    assert contents(folders) == before and leftovers(folders) == []


def test_changed_tensor_is_named(folders: Path, tmp_path: Path) -> None:
    harmed = shutil.copytree(folders / "small", tmp_path / "harmed")
    tensors = load_file(harmed / "model.safetensors")
    tensors["model.blocks.1.mlp.fc2.bias"][3] += 1e-3
    save_file(tensors, harmed / "model.safetensors", metadata={"format": "pt"})
    done = isoprune("doctor", harmed)
    assert (done.code, done.err) == (1, "")
    assert verdicts(done.out) == {**SOUND, "tensors": "FAIL"}
    assert "blocks.1.mlp.fc2.bias is not that of the base" in done.out
    assert f"{harmed}: 1 check failed" in done.out


@pytest.mark.families
def test_moved_base_is_found_by_its_weights(folders: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folders / "small", tmp_path / "moved")
    config = read(moved, "config.json")
    base = load_base(NAME, False, model_args=MODEL_ARGS, num_labels=10)
    base.model.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    config["source"] |= {"name": str(tmp_path / "gone"), "pretrained": True, "model_args": {}}
    (moved / "config.json").write_text(json.dumps(config))
    gone = isoprune("doctor", moved)
    assert gone.code == 0 and verdicts(gone.out) == {**SOUND, "tensors": "skip"}
    assert re.search(r"^skip  tensors .*does not exist", gone.out, re.MULTILINE)
    assert verdicts(succeed("doctor", moved, "--base", tmp_path / "base")) == SOUND
    with torch.no_grad():
        base.model.model.head.bias += 1
    base.model.save_pretrained(tmp_path / "base")
    other = isoprune("doctor", moved, "--base", tmp_path / "base")
    assert other.code == 1 and verdicts(other.out) == {**SOUND, "tensors": "FAIL"}
    assert "has other weights than the one that was cut" in other.out


def test_foreign_or_unreadable_plan_fails(folders: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(folders / "small", tmp_path / "mixed")
    shutil.copy(folders / "large" / "pruning_plan.json", mixed)
    done = isoprune("doctor", mixed)
    assert done.code == 1 and verdicts(done.out) == {**SOUND, "structure": "FAIL", "tensors": "FAIL"}
    (mixed / "pruning_plan.json").write_text("{")
    done = isoprune("doctor", mixed)
    assert done.code == 1
    assert verdicts(done.out) == {**SOUND, "plan": "FAIL", "structure": "skip", "tensors": "skip"}


def test_folder_that_does_not_load_fails(folders: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folders / "small", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    done = isoprune("doctor", broken)
    assert (done.code, done.err) == (1, "")
    assert verdicts(done.out) == {"load": "FAIL"} and "safetensors" in done.out
    shutil.copy(folders / "small" / "model.safetensors", broken)
    (broken / "preprocessor_config.json").unlink()
    done = isoprune("doctor", broken)
    assert done.code == 1 and verdicts(done.out) == {"load": "FAIL"}


def test_trained_weights_are_not_compared_with_base(folders: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    opened = load_base(str(folders / "small"))
    nn.init.normal_(opened.model.model.head.weight)
    opened.model.config.stage = "finetuned"
    opened.model.save_pretrained(trained)
    opened.processor.save_pretrained(trained)
    shutil.copy(folders / "small" / "pruning_plan.json", trained)
    printed = succeed("doctor", trained)
    assert verdicts(printed) == {**SOUND, "tensors": "skip"}
    assert "the weights were trained after the cut" in printed


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_verdicts_are_coloured_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    found = [Finding("load", "ok", "two\nlines"), Finding("cost", "FAIL", "5"), Finding("tensors", "skip", "no plan")]
    monkeypatch.setattr(checking, "examine_folder", lambda folder, base: found)
    (tmp_path / "config.json").write_text('{"model_type": "isoprune"}')
    with contextlib.redirect_stdout(Terminal()):
        answer = STAGE.run(folder=str(tmp_path), base=None)
    assert answer.text.splitlines() == [
        "\033[32mok  \033[0m  load       two",
        "                 lines",
        "\033[31;1mFAIL\033[0m  cost       5",
        "skip  tensors    no plan",
        f"{tmp_path}: 1 check failed",
    ]
    assert answer.code == 1 and answer.figures["failed"] == 1


BAD_INPUT: dict[str, tuple[list[str], list[str]]] = {
    "no folder": (["doctor"], ["required", "folder"]),
    "missing folder": (["doctor", "@tmp/none"], ["--folder", "none", "not the folder of a pruned model"]),
    "folder of nothing": (["doctor", "@root"], ["--folder", "not the folder of a pruned model"]),
    "unknown base": (["doctor", "@small", "--base", "timm/no_such_vit"], ["no model", "no_such_vit"]),
    "no folder of a base": (["doctor", "@small", "--base", "@tmp/none"], ["does not exist", "none"]),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_changes_nothing(kind: str, folders: Path, tmp_path: Path) -> None:
    check_refused(*BAD_INPUT[kind], folders, tmp_path)
