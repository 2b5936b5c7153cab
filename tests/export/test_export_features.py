"""An exported encoder returns the features of PyTorch by their names, and a script saves those of an image."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
import transformers
from helpers.command_line import succeed
from helpers.stage_commands import write_four_classes
from transformers import AutoImageProcessor, AutoModel

from isoprune_hf import IsoPruneConfig
from isoprune_hf.errors import ExportError
from isoprune_hf.export.bounded_int8 import MAX_DISTANCE
from isoprune_hf.export.comparison import compare_outputs
from isoprune_hf.export.formats import FORMATS
from isoprune_hf.export.running import ExportedOutputs
from isoprune_hf.export.script import write_script
from isoprune_hf.export.sensitivity import mean_distance
from isoprune_hf.measuring.tracing import labels_of, output_names, run_traced
from isoprune_hf.models.base import hold_unlabelled

TOWER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
OUTPUTS = ["last_hidden_state", "pooler_output"]
APART = {"executorch": "executorch", "litert": "ai_edge_litert"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images and a pruned encoder."""
    place = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)).save_pretrained(place / "encoder")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(place / "encoder")
    write_four_classes(place / "images")
    cut = ["--target-macs", "60%", "--prune.round_to", "1", "--prune.criterion", "l1"]
    succeed("prune", place / "encoder", *cut, "--output", place / "pruned")
    return place


def answers(target: str, folder: Path, pixels: np.ndarray) -> list[np.ndarray]:
    """Return the outputs of an exported folder, computed with its runtime as a user would."""
    if target == "onnx":
        return onnxruntime.InferenceSession(folder / "model.onnx").run(OUTPUTS, {"pixel_values": pixels})
    if target == "openvino":
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        found = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)(pixels)
        return [found[name] for name in OUTPUTS]
    found = torch.export.load(folder / "model.pt2").module()(torch.from_numpy(pixels))
    return [value.detach().numpy() for value in found]


OTHERS = [pytest.param(target, marks=pytest.mark.faults) for target in ("openvino", "torch-export")]


@pytest.mark.parametrize("target", [pytest.param("onnx", marks=pytest.mark.export), *OTHERS])
def test_exported_features_match_pytorch(target: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = succeed("export", place / "pruned", "--format", target, "--output", out, "--data", place / "images")
    assert "last_hidden_state and pooler_output up to" in printed and "the same class" not in printed
    model = AutoModel.from_pretrained(place / "pruned").eval()
    for count in (1, 3):
        pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model(pixels)
        for name, found in zip(OUTPUTS, answers(target, out, pixels.numpy()), strict=True):
            np.testing.assert_allclose(found, expected[name].numpy(), atol=1e-5, rtol=0)
    record, metrics = (json.loads((out / name).read_text()) for name in ("export.json", "metrics.json"))
    assert record["outputs"] == OUTPUTS and record["same_class"] is None
    assert metrics["pruned+fp32"]["cosine"] == pytest.approx(1, abs=1e-5) and "cosine" not in metrics["pruned"]
    card = (out / "README.md").read_text()
    assert "returns `last_hidden_state` and `pooler_output`" in card and "cosine_similarity" not in card
    image = next((place / "images" / "val").rglob("*.png"))
    command = [sys.executable, out / "extract.py", image]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "(1, 32)\n"
    processed = AutoImageProcessor.from_pretrained(out)(
        transformers.image_utils.load_image(str(image)), return_tensors="pt"
    )
    with torch.inference_mode():
        wanted = model(**processed).pooler_output.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "pooler_output.npy"), wanted, atol=1e-5, rtol=0)


@pytest.mark.faults
@pytest.mark.parametrize("target", APART)
def test_features_are_exported_for_small_devices(target: str, place: Path, tmp_path: Path) -> None:
    pytest.importorskip(APART[target])
    succeed("export", place / "pruned", "--format", target, "--output", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["outputs"] == OUTPUTS and record["difference"] < 1e-4 < record["largest"]


@pytest.mark.faults
def test_eight_bits_are_bounded_by_distance(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--precision", "int8", "--data", place / "images", "--output", out]
    printed = succeed("export", place / "pruned", *words)
    record = json.loads((out / "export.json").read_text())
    assert 0 < record["quantization"]["distance"] <= MAX_DISTANCE and "of their squared norm" in printed
    assert json.loads((out / "metrics.json").read_text())["pruned+int8"]["cosine"] > 0.95


def test_distance_is_relative_to_the_norm() -> None:
    reference, found = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[3.0, 3.0], [1.0, 2.0]])
    assert mean_distance(reference, found) == pytest.approx((1 / 25 + 1 / 4) / 2)
    assert mean_distance(reference, np.full_like(found, np.nan)) == float("inf")


def test_outputs_of_other_runtimes_get_their_shapes() -> None:
    network = ExportedOutputs(lambda pixels: np.arange(2 * 10.0).reshape(2, 10), [[2, 4], [2]])
    tokens, pooled = network(torch.zeros(2, 3, 1, 1))
    assert tokens.shape == (2, 2, 4) and tokens[1, 1].tolist() == [14, 15, 16, 17]
    assert pooled.tolist() == [[8, 9], [18, 19]]


def test_outputs_keep_the_names_of_transformers() -> None:
    config = transformers.Dinov2Config(**TOWER)
    base = {"library": "transformers", "config": config.to_dict(), "architecture": "Dinov2Model"}
    network = transformers.Dinov2Model(config).eval()
    described = IsoPruneConfig(base={**base, "task": "image-feature-extraction"}, image_size=[3, 16, 16])
    model = hold_unlabelled(described, network)
    assert output_names(model) == tuple(OUTPUTS) and labels_of(model) == {}
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = network(pixels)
    packed = torch.cat([found.last_hidden_state.flatten(1), found.pooler_output], 1)
    np.testing.assert_array_equal(run_traced(model, pixels.numpy()), packed.numpy())


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("onnx", '.run(["pooler_output"], {"pixel_values": pixels})[0]'),
        ("openvino", '(pixels)["pooler_output"]'),
        ("torch-export", "(torch.from_numpy(pixels))[1].detach().numpy()"),
        ("executorch", ".execute([torch.from_numpy(pixels)])[1].numpy()"),
        ("litert", '(pixel_values=pixels)["pooler_output"]'),
        ("coreml", '.predict({"pixel_values": pixels})["pooler_output"]'),
    ],
)
def test_script_takes_the_pooled_features(target: str, line: str) -> None:
    script = write_script(FORMATS[target], transformers.BitImageProcessor(), OUTPUTS, has_classes=False)
    assert line in script and 'numpy.save("pooler_output.npy", pooler_output)' in script
    compile(script, "extract.py", "exec")


def test_features_that_differ_are_refused() -> None:
    wanted = [np.array([[1.0, -4.0]])]
    close = compare_outputs(
        wanted, [np.array([[1.0, -4.003]])], target="onnx", precision="fp32", outputs=("a",), has_classes=False
    )
    assert close.difference == pytest.approx(0.003) and close.same_class is None
    with pytest.raises(ExportError, match=r"differs from PyTorch by 0\.005, at most 0\.004"):
        compare_outputs(wanted, [np.array([[1.005, -4.0]])], target="onnx", precision="fp32", has_classes=False)
