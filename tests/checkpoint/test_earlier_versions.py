"""Folders of earlier versions open and reproduce their logits."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.fresh_python import FreshPython
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

import isoprune_hf  # noqa: F401

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = sorted(path.parent for path in FIXTURES.glob("folders_*/*/config.json"))
# Without the package: the code that the version of that time has put into the folder, or stock transformers.
ALONE = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
folder, images, answers = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    save_file({"logits": model(load_file(images)["images"]).logits}, answers)
"""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_earlier_folder_reproduces_its_logits(folder: Path, fresh_python: FreshPython, tmp_path: Path) -> None:
    stored = load_file(folder.parent / "answers.safetensors")
    images = stored[f"{folder.name}.images"]
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(images).logits
    # Another processor rounds otherwise; the code of that time, run on this one, must not.
    torch.testing.assert_close(logits, stored[f"{folder.name}.logits"], rtol=0, atol=1e-5)
    copy = shutil.copytree(folder, tmp_path / folder.name)
    images_file, answers_file = (tmp_path / f"{name}.safetensors" for name in ("images", "answers"))
    save_file({"images": images}, images_file)
    done = fresh_python.run(ALONE, copy, images_file, answers_file, absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(answers_file)["logits"], logits)
