"""An int8 export has eight-bit weights with a scale for each channel, and layers in fp32 only where it needs them."""

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from helpers.command_line import read, refuse, succeed
from helpers.pruned_models import LABELS, Pruned
from onnx import numpy_helper
from PIL import Image
from transformers import AutoImageProcessor

from isoprune_hf.export import bounded_int8
from isoprune_hf.export.onnx import OnnxFormat
from isoprune_hf.export.openvino import OpenVinoFormat
from isoprune_hf.export.openvino_int8 import quantize_openvino
from isoprune_hf.export.static_int8 import quantize_static
from isoprune_hf.measuring.runtimes.onnx_runtime import open_onnx
from isoprune_hf.measuring.runtimes.openvino import open_openvino
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
) -> Callable[..., Path]:
    """Return a function that exports the pruned model of a family in int8 by the command line, once."""

    @functools.cache
    def give(family: str, target: str = "onnx") -> Path:
        if target == "openvino":
            pytest.importorskip("nncf")
            import_module("torch.utils.cpp_extension")  # nncf does, and it may warn of a missing GPU
        out = tmp_path_factory.mktemp("int8") / "out"
        flags = ["--precision", "int8", "--data", photos, "--calibration_images", "10", "--data.num_workers", "0"]
        succeed("export", pruned(family).folder, "--format", target, *flags, "--output", out)
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
def test_weights_are_int8_with_scale_per_channel(family: str, exported: Callable[..., Path]) -> None:
    folder = exported(family)
    found = layers(folder / "model.onnx")
    assert len(found) >= 5
    for weights, scales in found.values():
        assert scales.size in weights.shape
        assert 100 < abs(weights.astype(int)).max() <= 127
    record = read(folder, "export.json")["quantization"]
    assert record["calibration_images"] == 8 and record["held_out_images"] == 2
    assert record["divergence"] <= bounded_int8.MAX_DIVERGENCE
    assert not list(folder.glob(".*"))


@pytest.mark.export
def test_openvino_weights_are_int8_with_channel_scales(
    exported: Callable[..., Path], pruned: Callable[[str], Pruned]
) -> None:
    folder, model = exported("resnet", "openvino"), pruned("resnet").model
    nodes = openvino.Core().read_model(folder / "openvino_model.xml").get_ordered_ops()
    kinds = {openvino.Type.i8: [], openvino.Type.f32: []}
    for node in nodes:
        if node.get_type_name() == "Constant" and node.get_element_type() in kinds:
            kinds[node.get_element_type()].append(node.data)
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    weights, sizes = kinds[openvino.Type.i8], [layer.weight.numel() for layer in layers]
    assert sum(array.size for array in weights) == sum(sizes[1:])
    # The first ones of eight bits, which read the first layer, use half of the range, lest sums of products overflow.
    largest = sorted(abs(array.astype(int)).max() for array in weights)
    assert {*largest[:2]} <= {63, 64} and largest[2:] == [127] * (len(weights) - 2)
    scales = {(array.size, array.ndim) for array in kinds[openvino.Type.f32]}
    assert {(len(array), array.ndim) for array in weights} <= scales
    record = read(folder, "export.json")
    quantization = record["quantization"]
    assert quantization["always_out"] == quantization["left_out"]
    assert quantization | {"divergence": 0, "left_out": [], "always_out": []} == {
        "always_out": [],
        "calibration_images": 8,
        "divergence": 0,
        "held_out_images": 2,
        "left_out": [],
        "share_of_weights": pytest.approx(1 - sizes[0] / sum(sizes)),
    }
    assert len(quantization["left_out"]) == 1
    assert quantization["divergence"] <= bounded_int8.MAX_DIVERGENCE and "nncf" in record["versions"]
    assert 1e-4 < record["difference"] / record["largest"] < 0.25


@pytest.mark.export
def test_ranges_of_openvino_cover_all_images(
    pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    monkeypatch.setattr(bounded_int8, "MAX_DIVERGENCE", np.inf)
    sample, file = pruned("resnet"), tmp_path / "openvino_model.xml"
    pixels = np.random.default_rng(0).standard_normal((8, *sample.images.shape[1:]), dtype=np.float32)
    pixels[0] *= 4  # the mean of the images' ranges is less than half of the range over all
    OpenVinoFormat().write(trace_model(plain_copy(sample.model), torch.from_numpy(pixels)), file, LABELS)
    dense = openvino.Core().read_model(file)
    quantize_openvino(file, [pixels])
    nodes = openvino.Core().read_model(file).get_ordered_ops()
    first = next(node for node in nodes if node.get_type_name() == "FakeQuantize")
    low, high = (first.input_value(place).get_node().data.item() for place in (1, 2))
    name = first.input_value(0).get_node().get_friendly_name()
    (source,) = (node for node in dense.get_ordered_ops() if node.get_friendly_name() == name)
    part = openvino.Model([source.output(0)], dense.get_parameters())
    found = openvino.compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels[:6])[0]
    assert (low, high) == pytest.approx((found.min(), found.max()), rel=0.02, abs=0.02)


@pytest.mark.faults
def test_sensitive_layers_of_openvino_stay_in_fp32(
    pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    sample = pruned("resnet")
    pixels = np.random.default_rng(0).standard_normal((8, *sample.images.shape[1:]), dtype=np.float32)
    whole, records = [], []
    for name in ("all", "part"):
        file = tmp_path / name / "openvino_model.xml"
        file.parent.mkdir()
        OpenVinoFormat().write(trace_model(plain_copy(sample.model), torch.from_numpy(pixels)), file, LABELS)
        records.append(quantize_openvino(file, [pixels]).record)
        nodes = openvino.Core().read_model(file).get_ordered_ops()
        constants = [node for node in nodes if node.get_type_name() == "Constant"]
        whole.append(sum(node.data.size for node in constants if node.get_element_type() == openvino.Type.i8))
        monkeypatch.setattr(bounded_int8, "MAX_DIVERGENCE", 0.8 * records[0]["divergence"])
    assert len(records[0]["left_out"]) == 1  # the first layer
    assert len(records[1]["left_out"]) > 1 and records[1]["divergence"] <= bounded_int8.MAX_DIVERGENCE
    shares = [record["share_of_weights"] for record in records]
    assert whole[1] == pytest.approx(shares[1] / shares[0] * whole[0], rel=0.01)


CASES = [pytest.param("resnet", target, marks=pytest.mark.export) for target in ("onnx", "openvino")]
CASES += [pytest.param("vit", target, marks=pytest.mark.faults) for target in ("onnx", "openvino")]


@pytest.mark.parametrize(("family", "target"), CASES)
def test_figures_are_those_of_the_runtime(
    family: str, target: str, exported: Callable[..., Path], pruned: Callable[[str], Pruned], photos: Path
) -> None:
    folder, sample = exported(family, target), pruned(family)
    processor = AutoImageProcessor.from_pretrained(folder)
    is_onnx = target == "onnx"
    run = open_onnx(folder / "model.onnx") if is_onnx else open_openvino(folder / "openvino_model.xml")
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
    sizes = [file.stat().st_size for file in folder.glob("model.onnx" if is_onnx else "openvino_model.*")]
    assert metrics["pruned+int8"]["file_mb"] == sum(sizes) / 1e6
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
    monkeypatch.setattr(bounded_int8, "MAX_DIVERGENCE", 0.8 * everything.record["divergence"])
    part = quantize_static(files[1], batches)
    assert part.record["left_out"] and part.record["divergence"] <= bounded_int8.MAX_DIVERGENCE
    assert 0.5 <= part.record["share_of_weights"] <= 1
    whole = [sum(weights.size for weights, _ in layers(file).values()) for file in files]
    assert whole[1] == pytest.approx(part.record["share_of_weights"] * whole[0], rel=0.01)


def test_int8_without_images_or_format_is_refused(
    pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = pruned("vit").folder, ["--output", tmp_path / "out"]
    line = refuse("export", folder, "--precision", "int8", *out)
    assert "--precision int8" in line and "--data" in line
    line = refuse("export", folder, "--precision", "int8", "--format", "openvino", *out)
    assert "--precision int8" in line and "--data" in line
    line = refuse("export", folder, "--precision", "int8", "--format", "torch-export", *out)
    assert "--format onnx or openvino or executorch" in line
    monkeypatch.setitem(sys.modules, "nncf", None)
    line = refuse("export", folder, "--precision", "int8", "--format", "openvino", "--data", tmp_path, *out)
    assert "--format openvino --precision int8 needs nncf," in line and "isoprune-hf[openvino]" in line
    assert "--precision" in refuse("export", folder, "--quantize", "dynamic", *out)
    assert "--calibration_images" in refuse("export", folder, "--calibration_images", "0", *out)
    assert not list(tmp_path.iterdir())
