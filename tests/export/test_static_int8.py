"""An int8 export has eight-bit weights with a scale for each channel, and layers in fp32 only where it needs them."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.command_line import read, refuse, succeed
from helpers.pruned_models import LABELS, Pruned
from onnx import numpy_helper
from PIL import Image
from transformers import AutoImageProcessor

from isoprune_hf.export import static_int8
from isoprune_hf.export.onnx import OnnxFormat
from isoprune_hf.export.static_int8 import quantize_static
from isoprune_hf.measuring.runtimes.onnx_runtime import open_onnx
from isoprune_hf.measuring.tracing import plain_copy, trace_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the splits train and val, with three coarse pictures of each class of the pruned models."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in LABELS.values():
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                coarse.resize((48, 40), Image.Resampling.BICUBIC).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def exported(
    pruned: Callable[[str], Pruned], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that exports the pruned model of a family in int8 by the command line, once."""

    @functools.cache
    def give(family: str) -> Path:
        out = tmp_path_factory.mktemp("int8") / "out"
        flags = ["--precision", "int8", "--data", photos, "--calibration_images", "10", "--data.num_workers", "0"]
        succeed("export", pruned(family).folder, *flags, "--output", out)
        return out

    return give


def layers(file: Path) -> dict[str, list[np.ndarray]]:
    """Return weights and scales of the layers of a file: int8 arrays, then their scales."""
    graph = onnx.load(file).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays and arrays[node.input[0]].dtype == np.int8:
            found[node.input[0]] = [arrays[node.input[0]], arrays[node.input[1]]]
    return found


FAMILIES = [pytest.param("resnet", marks=pytest.mark.export), pytest.param("vit", marks=pytest.mark.faults)]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_int8_with_scale_per_channel(family: str, exported: Callable[[str], Path]) -> None:
    folder = exported(family)
    found = layers(folder / "model.onnx")
    assert len(found) >= 5
    for weights, scales in found.values():
        assert scales.size in weights.shape
        assert 100 < abs(weights.astype(int)).max() <= 127
    record = read(folder, "export.json")["quantization"]
    assert record["calibration_images"] == 10 and record["divergence"] <= static_int8.MAX_DIVERGENCE
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_the_runtime(
    family: str, exported: Callable[[str], Path], pruned: Callable[[str], Pruned], photos: Path
) -> None:
    folder, sample = exported(family), pruned(family)
    processor, run = AutoImageProcessor.from_pretrained(folder), open_onnx(folder / "model.onnx")
    labels, dense, int8 = [], [], []
    for label, name in LABELS.items():
        for file in sorted((photos / "val" / name).iterdir()):
            pixels = processor(Image.open(file), return_tensors="pt").pixel_values
            labels.append(label)
            int8.append(int(run(pixels.numpy()).argmax()))
            dense.append(int(sample.model(pixels).logits.argmax()))
    metrics = read(folder, "metrics.json")
    assert list(metrics) == ["pruned", "pruned+int8"]
    assert metrics["pruned"]["top1"] == pytest.approx(np.mean(np.equal(dense, labels)))
    assert metrics["pruned+int8"]["top1"] == pytest.approx(np.mean(np.equal(int8, labels)))
    assert metrics["pruned+int8"]["agreement"] == pytest.approx(np.mean(np.equal(int8, dense)))
    assert metrics["pruned+int8"]["file_mb"] == (folder / "model.onnx").stat().st_size / 1e6
    card = (folder / "README.md").read_text()
    assert f"| pruned+int8 | {100 * metrics['pruned+int8']['top1']:.2f} |" in card


@pytest.mark.faults
def test_sensitive_layers_stay_in_fp32(
    pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = pruned("resnet")
    files = [tmp_path / "all.onnx", tmp_path / "part.onnx"]
    pixels = np.random.default_rng(0).standard_normal((8, *sample.images.shape[1:]), dtype=np.float32)
    batches = [pixels[:4], pixels[4:]]
    for file in files:
        OnnxFormat().write(trace_model(plain_copy(sample.model), torch.from_numpy(pixels)), file, LABELS)
    everything = quantize_static(files[0], batches)
    assert everything.record["left_out"] == []
    monkeypatch.setattr(static_int8, "MAX_DIVERGENCE", 0.8 * everything.record["divergence"])
    part = quantize_static(files[1], batches)
    assert part.record["left_out"] and part.record["divergence"] <= static_int8.MAX_DIVERGENCE
    assert 0.5 <= part.record["share_of_weights"] <= 1
    whole = [sum(weights.size for weights, _ in layers(file).values()) for file in files]
    assert whole[1] == pytest.approx(part.record["share_of_weights"] * whole[0], rel=0.01)


def test_int8_without_images_or_format_is_refused(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    folder, out = pruned("vit").folder, ["--output", tmp_path / "out"]
    line = refuse("export", folder, "--precision", "int8", *out)
    assert "--precision int8" in line and "--data" in line
    line = refuse("export", folder, "--precision", "int8", "--format", "openvino", *out)
    assert "--format onnx" in line
    assert "--precision" in refuse("export", folder, "--quantize", "dynamic", *out)
    assert "--calibration_images" in refuse("export", folder, "--calibration_images", "0", *out)
    assert not list(tmp_path.iterdir())
