"""The command line prunes a network of depth estimation whose image processor keeps the aspect ratio of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.command_line import succeed
from helpers.depth_networks import make_depth_anything
from helpers.fresh_python import FreshPython
from PIL import Image
from transformers import AutoModelForDepthEstimation

SCRIPT = """
import json, sys
from transformers import pipeline
folder, image = sys.argv[1:]
found = pipeline("depth-estimation", model=folder, trust_remote_code=True)(image)["predicted_depth"]
print(json.dumps([list(found.shape), float(found.mean()), bool(sys.modules.get("isoprune_hf"))]))
"""


@pytest.mark.families
def test_depth_network_is_pruned_from_images_alone(tmp_path: Path, fresh_python: FreshPython) -> None:
    make_depth_anything().save_pretrained(tmp_path / "base")
    processor = transformers.DPTImageProcessor(
        size={"height": 28, "width": 28}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    processor.save_pretrained(tmp_path / "base")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        (tmp_path / "images" / part).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (30 + 2 * number, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / part / f"{number}.png")
    words = ["--target-macs", "60%", "--prune.round_to", "1", "--prune.criterion", "gate_fisher"]
    succeed("prune", tmp_path / "base", *words, "--data", tmp_path / "images", "--output", tmp_path / "pruned")
    figures = json.loads((tmp_path / "pruned" / "metrics.json").read_text())["pruned"]
    dense, cut = (AutoModelForDepthEstimation.from_pretrained(tmp_path / name).eval() for name in ("base", "pruned"))
    square = transformers.DPTImageProcessor(size={"height": 28, "width": 28}, ensure_multiple_of=14)
    files = sorted((tmp_path / "images" / "val").iterdir())
    pixels = square([Image.open(file) for file in files], return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted, found = dense(pixels).predicted_depth.double(), cut(pixels).predicted_depth.double()
    difference = ((found - wanted).abs().mean((1, 2)) / wanted.abs().mean((1, 2))).mean()
    assert figures["images"] == 3 and figures["depth_difference"] == pytest.approx(float(difference), abs=1e-6)
    assert figures["delta1"] == pytest.approx(
        float((torch.maximum(found / wanted, wanted / found) < 1.25).double().mean())
    )
    assert "FAIL" not in succeed("doctor", tmp_path / "pruned")
    done = fresh_python.run(SCRIPT, tmp_path / "pruned", files[0], absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    shape, mean, is_ours = json.loads(done.stdout.splitlines()[-1])
    assert shape == [30, 40] and not is_ours
    again = transformers.pipeline("depth-estimation", model=str(tmp_path / "pruned"))
    assert float(again(str(files[0]))["predicted_depth"].mean()) == pytest.approx(mean)
