"""A model for other runtimes: ONNX, OpenVINO or torch.export, kept only if it answers as PyTorch does."""

import copy
import hashlib
import json
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, describe_error
from isoprune_hf.checkpoint.folder import replace_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, code_that_ships
from isoprune_hf.errors import ExportError, RecipeError
from isoprune_hf.extras import require_package
from isoprune_hf.measuring.speed import draw_images

Format = Literal["onnx", "openvino", "torch-export"]
Quantization = Literal["none", "dynamic"]
Run = Callable[[np.ndarray], np.ndarray]

_FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml", "torch-export": "model.pt2"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "torch-export": ()}
# Of the largest logit. Other kernels round otherwise; integers of eight bits are another matter.
_MOST_APART, _MOST_APART_QUANTISED = 1e-3, 0.25
_LARGEST_ONNX = 2**31 - 2**24  # bytes that one file of protobuf holds, less some for the graph


class Export(NamedTuple):
    """An exported model, and how its logits differ from those of PyTorch.

    Args:
        file: Name of the model's file in its folder.
        difference: The largest difference of two logits, over all images and batches.
        largest: The largest logit of PyTorch, by its absolute value.
        batches: Images in each batch that was compared.
        same_class: Images whose first class is the same.
    """

    file: str
    difference: float
    largest: float
    batches: tuple[int, ...]
    same_class: int


def export_model(
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    folder: str | Path,
    *,
    target: Format,
    quantize: Quantization = "none",
) -> Export:
    """Write a folder with the exported model, its labels and its image processor; whole, or not at all.

    The model takes `pixel_values` (B, C, H, W) of any batch size in fp32 and gives `logits` (B, num_labels).

    Args:
        model: The model in eval mode; left untouched.
        processor: Its image processor.
        folder: The folder; one that is there is replaced.
        target: onnx, openvino or torch-export.
        quantize: dynamic stores the weights of an ONNX model in eight bits, and rounds the activations on the way.

    Raises:
        RecipeError: The format cannot be quantised.
        MissingExtraError: A package is missing.
        ExportError: The model cannot be exported, or its answers are not those of PyTorch.
        CheckpointError: The folder cannot be written.
    """
    check_export(target, quantize)
    batches = _photographs(processor)
    plain = _plain_copy(model)
    with torch.inference_mode():
        expected = [plain(torch.from_numpy(pixels)).logits.numpy() for pixels in batches]
    results: list[Export] = []

    def write(temporary: Path) -> None:
        file = temporary / _FILES[target]
        try:
            program = _trace(plain, torch.from_numpy(batches[-1]))
            run = _WRITERS[target](program, file, plain.config.id2label)
            if quantize == "dynamic":
                run = _quantise(file)
            found = [run(pixels) for pixels in batches]
        except (*LIBRARY_ERRORS, OSError) as error:
            raise ExportError(f"the model cannot be exported to {target}: {describe_error(error)}") from error
        results.append(_compare(target, quantize, expected, found))
        _write_beside(temporary, plain, processor)
        record = {"format": target, "quantize": quantize, **results[0]._asdict(), "versions": _versions(target)}
        record["weights"] = fingerprint_weights(model)
        (temporary / "export.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")

    replace_folder(folder, write)
    return results[0]


def check_export(target: Format, quantize: Quantization) -> None:
    """Check, before any work, that an export can be made here.

    Raises:
        RecipeError: The format cannot be quantised.
        MissingExtraError: A package is missing.
    """
    if quantize != "none" and target != "onnx":
        raise RecipeError(f"--quantize {quantize} is for --format onnx, got --format {target}")
    for package in (*_PACKAGES[target], "sklearn"):
        require_package(package, f"--format {target}", "export")


def fingerprint_weights(model: nn.Module) -> str:
    """Hash all tensors of a model in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _Logits(nn.Module):
    """Gives the logits alone: runtimes know tensors, not the outputs of transformers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def _plain_copy(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    """Copy a model to the CPU in fp32, with attention that can be traced."""
    plain = copy.deepcopy(model).to(device="cpu", dtype=torch.float32)
    if model.config.base["library"] == "transformers":
        # The fused attention leaves a layout that its own decomposition cannot view as the model does.
        plain.model.set_attn_implementation("eager")
    return plain


def _trace(model: nn.Module, pixels: torch.Tensor) -> torch.export.ExportedProgram:
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(_Logits(model), (pixels,), dynamic_shapes=shapes, strict=False)


def _write_onnx(program: torch.export.ExportedProgram, file: Path, labels: dict[int, str]) -> Run:
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["pixel_values"], output_names=["logits"], verbose=False
    )
    exported.model.metadata_props["id2label"] = json.dumps(labels)
    exported.save(file, external_data=size > _LARGEST_ONNX)
    return open_onnx(file)


def write_onnx(model: IsoPruneForImageClassification, file: Path, *, threads: int) -> Run:
    """Write a model as ONNX and open it again on the CPU; what comes back gives the logits of pixels (B, C, H, W).

    Args:
        model: The model in eval mode; left untouched.
        file: Where it is written.
        threads: Threads of one operator.

    Raises:
        ExportError: It cannot be exported.
    """
    plain = _plain_copy(model)
    try:
        _write_onnx(_trace(plain, draw_images(plain, plain.config.image_size, 2)), file, plain.config.id2label)
        return open_onnx(file, threads)
    except (*LIBRARY_ERRORS, OSError) as error:
        raise ExportError(f"the model cannot be exported to onnx: {describe_error(error)}") from error


def open_onnx(file: Path, threads: int = 0) -> Run:
    """Open an ONNX model on the CPU; what comes back runs it on pixels (B, C, H, W) and gives its logits.

    Args:
        file: The model.
        threads: Threads of one operator; 0 takes all cores.
    """
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits"], {"pixel_values": pixels})[0]


def _quantise(file: Path) -> Run:
    tools = import_module("onnxruntime.quantization")
    prepared = file.with_name("prepared.onnx")
    # Inferred shapes; without them the tool says on the terminal that it would like some.
    tools.quant_pre_process(file, prepared, skip_symbolic_shape=True)
    # Convolutions of the CPU know unsigned weights only.
    tools.quantize_dynamic(prepared, file, weight_type=tools.QuantType.QUInt8)
    prepared.unlink()
    return open_onnx(file)


def _write_openvino(program: torch.export.ExportedProgram, file: Path, labels: dict[int, str]) -> Run:
    openvino = import_module("openvino")
    converted = openvino.convert_model(program)
    _, *size = program.example_inputs[0][0].shape
    converted.reshape([-1, *size])
    converted.output(0).get_tensor().set_names({"logits"})
    converted.set_rt_info(
        " ".join(labels[index].replace(" ", "_") for index in sorted(labels)), ["model_info", "labels"]
    )
    openvino.save_model(converted, file, compress_to_fp16=False)
    # Else a CPU with units for bf16 would compute in it.
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: compiled(pixels)["logits"]


def _write_program(program: torch.export.ExportedProgram, file: Path, labels: dict[int, str]) -> Run:
    program.example_inputs = None  # they would lie in the file
    torch.export.save(program, file, extra_files={"id2label.json": json.dumps(labels)})
    opened = torch.export.load(file).module()

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return opened(torch.from_numpy(pixels)).numpy()

    return run


_WRITERS = {"onnx": _write_onnx, "openvino": _write_openvino, "torch-export": _write_program}


def _photographs(processor: BaseImageProcessor) -> list[np.ndarray]:
    """Pixels of the two photographs that scikit-learn ships, whole and in parts: a batch of one, and one of four."""
    first, second = (Image.fromarray(image) for image in import_module("sklearn.datasets").load_sample_images().images)
    width, height = first.size
    parts = [first.crop((0, 0, width // 2, height)), first.crop((width // 2, 0, width, height // 2))]
    images = [first, second, *parts, second.crop((width // 4, height // 4, width, height))]
    return [
        np.ascontiguousarray(processor(batch, return_tensors="np").pixel_values, dtype=np.float32)
        for batch in (images[:1], images[1:])
    ]


def _compare(target: str, quantize: str, expected: list[np.ndarray], found: list[np.ndarray]) -> Export:
    if [array.shape for array in found] != [array.shape for array in expected]:
        raise ExportError(f"the model in {target} gives {[array.shape for array in found]}, not logits of each class")
    wanted, given = np.concatenate(expected), np.concatenate(found)
    difference, largest = float(abs(given - wanted).max()), float(abs(wanted).max())
    limit = (_MOST_APART if quantize == "none" else _MOST_APART_QUANTISED) * largest
    if not difference <= limit:  # also where one is no number
        what = "try --quantize none" if quantize != "none" else "no file is kept"
        raise ExportError(
            f"the model in {target} differs from PyTorch by {difference:.3g} in a logit, more than {limit:.3g}; {what}"
        )
    same = int((wanted.argmax(1) == given.argmax(1)).sum())
    return Export(_FILES[target], difference, largest, tuple(len(array) for array in expected), same)


def _write_beside(folder: Path, model: IsoPruneForImageClassification, processor: BaseImageProcessor) -> None:
    """Write labels and processor; they open with and without isoprune_hf, as those of the model's own folder do."""
    model.config.auto_map = {"AutoConfig": "modeling_isoprune.IsoPruneConfig"}
    if model.config.base["library"] != "transformers":
        model.config.auto_map["AutoImageProcessor"] = "modeling_isoprune.IsoImageProcessor"
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "modeling_isoprune.py").write_text(code_that_ships())


def _versions(target: Format) -> dict[str, str]:
    return {name: version(name) for name in ("torch", *_PACKAGES[target])}
