"""Exported models return the logits of PyTorch for every batch size; labels and processor are exported too."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from helpers.command_line import contents, isoprune, read, refuse
from helpers.fresh_python import FreshPython
from helpers.pruned_models import LABELS, Pruned
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor

from isoprune_hf.errors import ExportError
from isoprune_hf.export import export
from isoprune_hf.export.executorch import ExecuTorchFormat
from isoprune_hf.export.export import export_model
from isoprune_hf.export.formats import FORMATS
from isoprune_hf.measuring.tracing import plain_copy, trace_model

ROOT = Path(__file__).parents[2]
FILES = {"config.json", "export.json", "modeling_isoprune.py", "preprocessor_config.json", "README.md", "classify.py"}
FILES |= {"image_processing_isoprune.py"}
MODELS = {"onnx": {"model.onnx"}, "openvino": {"openvino_model.xml", "openvino_model.bin"}}
MODELS["torch-export"] = {"model.pt2"}
MODELS["executorch"] = {"model.pte"}
MODELS["litert"] = {"model.tflite"}
APART = {"executorch": "executorch", "litert": "ai_edge_litert"}  # not installed with the others: they bring torchao


def digits(folder: Path, count: int) -> torch.Tensor:
    """Return handwritten digits, preprocessed by the processor in a folder."""
    processor = AutoImageProcessor.from_pretrained(folder)
    drawn = (16 * load_digits().images[:count]).clip(0, 255).astype(np.uint8)
    images = [Image.fromarray(image).convert("RGB") for image in drawn]
    return processor(images, return_tensors="pt").pixel_values


def answers(target: str, folder: Path, pixels: torch.Tensor) -> np.ndarray:
    """Return the logits of an exported folder, computed with its runtime as a user would."""
    if target == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {"pixel_values": pixels.numpy()})[0]
    if target == "openvino":
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        return openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)(pixels.numpy())["logits"]
    if target == "executorch":
        program = pytest.importorskip("executorch.runtime").Runtime.get().load_program(folder / "model.pte")
        method = program.load_method("forward")
        return np.concatenate([method.execute([image[None]])[0].numpy().copy() for image in pixels])
    if target == "litert":
        interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(str(folder / "model.tflite"))
        interpreter.allocate_tensors()
        logits = []
        for image in pixels.numpy():
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
            interpreter.invoke()
            logits.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
        return np.stack(logits)
    return torch.export.load(folder / "model.pt2").module()(pixels).detach().numpy()


class Exported(NamedTuple):
    """The folder of an exported model, and what the command printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def exported(pruned: Callable[[str], Pruned], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Return a function that exports a pruned model by the command line, once; the folder must not be changed."""

    @functools.cache
    def give(family: str, target: str, precision: str = "fp32") -> Exported:
        if target in APART:
            pytest.importorskip(APART[target])
        out = tmp_path_factory.mktemp("exported") / "out"
        flags = ["--format", target, "--precision", precision]
        done = isoprune("export", pruned(family).folder, *flags, "--output", out)
        assert (done.code, done.err) == (0, "")
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        return Exported(out, done.out)

    return give


CASES = [
    pytest.param(*case, marks=pytest.mark.export)
    for case in [("vit", "onnx"), ("vit", "torch-export"), ("resnet", "openvino"), ("vit", "executorch")]
]
CASES += [pytest.param(family, "litert", marks=pytest.mark.export) for family in ("vit", "resnet")]
CASES += [pytest.param(*case, marks=pytest.mark.faults) for case in [("vit", "openvino"), ("hf-swin", "onnx")]]


@pytest.mark.parametrize(("family", "target"), CASES)
def test_exported_logits_match_pytorch_for_any_batch_size(
    family: str, target: str, pruned: Callable[[str], Pruned], exported: Callable[..., Exported]
) -> None:
    sample, (out, printed) = pruned(family), exported(family, target)
    of_transformers = {"image_processing_isoprune.py"} if family.startswith("hf-") else set()
    assert {path.name for path in out.iterdir()} == (FILES | MODELS[target]) - of_transformers
    for count in (1, 3, 7):
        pixels = digits(out, count)
        with torch.inference_mode():
            expected = sample.model(pixels).logits.numpy()
        np.testing.assert_allclose(answers(target, out, pixels), expected, atol=1e-5, rtol=0)
    record = read(out, "export.json")
    assert ("any batch size" in printed) == record["takes_batches"] == (target not in APART)
    found, largest = record["difference"], record["largest"]
    assert f"largest difference to PyTorch: {found:.3g}, logits up to {largest:.3g}" in printed
    assert found < 1e-5 < 0.1 < largest
    assert (record["batches"], record["same_class"], record["precision"]) == ([1, 4], 5, "fp32")


@pytest.mark.export
def test_executorch_runs_batches_of_any_size(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    plain = plain_copy(pruned("vit").model)
    pixels = torch.randn(40, *plain.config.image_size, generator=torch.Generator().manual_seed(0))
    run = ExecuTorchFormat().write(trace_model(plain, pixels[:4]), tmp_path / "model.pte", LABELS)
    with torch.inference_mode():
        expected = plain(pixels).logits.numpy()
    np.testing.assert_allclose(run(pixels.numpy()), expected, atol=1e-5, rtol=0)


@pytest.mark.export
def test_labels_and_processor_are_exported(pruned: Callable[[str], Pruned], exported: Callable[..., Exported]) -> None:
    sample, out = pruned("vit"), exported("vit", "onnx").folder
    names = {str(index): name for index, name in LABELS.items()}
    assert read(out, "config.json")["id2label"] == names
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["id2label"]) == names
    image = Image.effect_mandelbrot((61, 47), (-2, -1, 1, 1), 30)
    processors = [AutoImageProcessor.from_pretrained(folder) for folder in (sample.folder, out)]
    first, second = (processor(image, return_tensors="pt").pixel_values for processor in processors)
    assert torch.equal(first, second)
    code = [(folder / "modeling_isoprune.py").read_bytes() for folder in (sample.folder, out)]
    assert code[0] == code[1]


@pytest.mark.export
@pytest.mark.parametrize("target", MODELS)
def test_script_beside_model_runs_without_isoprune_hf(
    target: str,
    pruned: Callable[[str], Pruned],
    exported: Callable[..., Exported],
    fresh_python: FreshPython,
    tmp_path: Path,
) -> None:
    sample, folder = pruned("vit"), exported("vit", target).folder
    image = Image.effect_mandelbrot((61, 47), (-2, -1, 1, 1), 30).convert("RGB")
    image.save(tmp_path / "image.png")
    script = (folder / "classify.py").read_text()
    assert sum(bool(line) for line in script.splitlines()) <= 10
    run = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.argv[1:] = ['image.png']; import classify"
    done = fresh_python.run(run, cwd=tmp_path, absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        logits = sample.model(**sample.processor(image, return_tensors="pt")).logits
    assert done.stdout.strip() == LABELS[int(logits.argmax())]


@pytest.mark.export
@pytest.mark.parametrize("target", ["onnx", "litert"])
def test_script_beside_model_needs_no_torch(target: str, exported: Callable[..., Exported], tmp_path: Path) -> None:
    folder = exported("vit", target).folder
    Image.effect_mandelbrot((61, 47), (-2, -1, 1, 1), 30).convert("RGB").save(tmp_path / "image.png")
    absent = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'timm', 'isoprune_hf']))"
    run = f"{absent}; sys.path.insert(0, {str(folder)!r}); import classify"
    command = [sys.executable, "-c", run, str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in LABELS.values()
    assert "torch" not in (folder / "README.md").read_text().partition("pip install")[2].partition(")")[0]


HALF = [pytest.param("vit", "onnx", "fp16", 5e-3, marks=pytest.mark.export)]
HALF += [
    pytest.param("vit", "torch-export", "bf16", 5e-2, marks=pytest.mark.export),
    pytest.param("resnet", "openvino", "fp16", 5e-3, marks=pytest.mark.export),
    pytest.param("vit", "torch-export", "fp16", 5e-3, marks=pytest.mark.faults),
    pytest.param("resnet", "onnx", "fp16", 5e-3, marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("family", "target", "precision", "limit"), HALF)
def test_half_precision_halves_file_and_keeps_logits(
    family: str,
    target: str,
    precision: str,
    limit: float,
    pruned: Callable[[str], Pruned],
    exported: Callable[..., Exported],
) -> None:
    folders = [exported(family, target, name).folder for name in ("fp32", precision)]
    sizes = [sum((folder / name).stat().st_size for name in MODELS[target]) for folder in folders]
    assert sizes[0] - sizes[1] > 0.4 * sum(tensor.nbytes for tensor in pruned(family).model.parameters())
    folder = folders[1]
    pixels = digits(folder, 4)
    with torch.inference_mode():
        expected = pruned(family).model(pixels).logits.numpy()
    apart = abs(answers(target, folder, pixels) - expected).max() / abs(expected).max()
    assert 1e-6 < apart < limit


@pytest.mark.export
@pytest.mark.parametrize("family", ["vit", pytest.param("resnet", marks=pytest.mark.faults)])
def test_eight_bit_weights_shrink_file_and_keep_classes(
    family: str, pruned: Callable[[str], Pruned], exported: Callable[..., Exported]
) -> None:
    folders = {name: exported(family, "onnx", name).folder for name in ("fp32", "int8-dynamic")}
    sizes = {name: sum(w.nbytes for w in _weights(folder / "model.onnx")) for name, folder in folders.items()}
    assert sizes["int8-dynamic"] < 0.5 * sizes["fp32"]
    for folder in folders.values():
        assert read(folder, "export.json")["same_class"] == 5
        assert {path.name for path in folder.iterdir()} == FILES | MODELS["onnx"]
    pixels = digits(folders["int8-dynamic"], 4)
    with torch.inference_mode():
        expected = pruned(family).model(pixels).logits.numpy()
    apart = abs(answers("onnx", folders["int8-dynamic"], pixels) - expected).max() / abs(expected).max()
    assert 1e-4 < apart < 0.1


def _weights(file: Path) -> list[np.ndarray]:
    onnx = pytest.importorskip("onnx")
    return [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]


@pytest.mark.export
def test_differing_logits_are_an_error_and_write_nothing(
    pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = pruned("vit")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    before = contents(tmp_path)

    def trace(model: torch.nn.Module, *rest: object, trace_model: Callable = export.trace_model) -> object:
        with torch.no_grad():
            next(reversed(list(model.parameters()))).add_(0.1)  # the bias of the head
        return trace_model(model, *rest)

    monkeypatch.setattr(export, "trace_model", trace)
    with pytest.raises(ExportError, match=r"torch-export differs from PyTorch by 0\.1,.* no file is kept"):
        export_model(sample.model, sample.processor, tmp_path / "out", target="torch-export")
    assert contents(tmp_path) == before


def test_untraceable_model_is_reported_in_one_line(
    pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*_: object) -> None:
        raise RuntimeError("a branch depends\non data")

    monkeypatch.setattr(export, "trace_model", trace)
    line = refuse("export", pruned("vit").folder, "--output", tmp_path / "out")
    assert "onnx: RuntimeError: a branch depends on data" in line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("target", "package"),
    [
        ("onnx", "onnx"),
        ("onnx", "onnxscript"),
        ("onnx", "onnxruntime"),
        ("openvino", "openvino"),
        ("executorch", "executorch"),
        ("litert", "litert_torch"),
        ("litert", "ai_edge_litert"),
        ("coreml", "coremltools"),
    ],
)
def test_missing_package_is_named_with_its_extra(
    target: str, package: str, pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in FORMATS[target].packages:
        monkeypatch.setitem(sys.modules, other, None if other == package else ModuleType(other))
    line = refuse("export", pruned("vit").folder, "--format", target, "--output", tmp_path / "out")
    extra = "export" if target == "onnx" else target
    assert f"--format {target} needs {package}," in line and f"isoprune-hf[{extra}]" in line
    assert contents(tmp_path) == {}


def test_impossible_export_is_refused_before_any_work(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    folder = pruned("vit").folder
    wrong = ["--format", "openvino", "--precision", "int8-dynamic", "--output", tmp_path / "out"]
    line = refuse("export", folder, *wrong)
    assert "--precision int8-dynamic" in line and "--format openvino" in line
    same = ["--output", folder, "--overwrite", "true"]
    assert "--output" in refuse("export", folder, *same)
    assert f"{tmp_path / 'none'}" in refuse("export", tmp_path / "none", "--output", tmp_path / "out")
    assert "onx" in refuse("export", folder, "--format", "onx", "--output", tmp_path / "out")
    assert contents(tmp_path) == {}
