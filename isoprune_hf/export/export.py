"""Write the folder of an exported model: `check_export` first, then `export_model`.

The folder is kept only if the exported model returns the logits of PyTorch.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.dense import describe_error
from isoprune_hf.checkpoint.finite import require_finite
from isoprune_hf.checkpoint.folder import replace_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, code_that_ships
from isoprune_hf.checkpoint.target import Target
from isoprune_hf.errors import ExportError, RecipeError
from isoprune_hf.export.comparison import Export, Quantization, compare_logits
from isoprune_hf.export.formats import FORMATS, Format
from isoprune_hf.export.pictures import draw_pictures
from isoprune_hf.extras import require_package
from isoprune_hf.measuring.tracing import EXPORT_ERRORS, labels_of, plain_copy, trace_model


def export_model(
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    folder: str | Path | Target,
    *,
    target: Format,
    quantize: Quantization = "none",
) -> Export:
    """Write a folder with the exported model, its labels and its image processor, completely or not at all.

    The exported model maps `pixel_values` (B, C, H, W) of any batch size in fp32 to `logits` (B, num_labels).

    Args:
        model: The model in eval mode; it is not changed.
        processor: Its image processor.
        folder: The folder, or the one that this process has locked; an existing one is replaced.
        target: `onnx`, `openvino` or `torch-export`.
        quantize: `dynamic` stores the weights of an ONNX model in eight bits and rounds activations at run time.

    Raises:
        RecipeError: The format cannot be quantized.
        MissingExtraError: A package is missing.
        ExportError: The model cannot be exported, or its logits differ from those of PyTorch.
        CheckpointError: The folder cannot be written, or a tensor is not finite.
    """
    check_export(target, quantize)
    require_finite(model)
    batches = draw_pictures(processor)
    plain = plain_copy(model)
    with torch.inference_mode():
        expected = [plain(torch.from_numpy(pixels)).logits.numpy() for pixels in batches]
    results: list[Export] = []

    def write(temporary: Path) -> None:
        file = temporary / FORMATS[target].file
        try:
            program = trace_model(plain, torch.from_numpy(batches[-1]))
            run = FORMATS[target].write(program, file, labels_of(plain))
            rewrite = FORMATS[target].quantize
            if quantize == "dynamic" and rewrite is not None:
                run = rewrite(file)
            found = [run(pixels) for pixels in batches]
        except EXPORT_ERRORS as error:
            raise ExportError(f"the model cannot be exported to {target}: {describe_error(error)}") from error
        results.append(compare_logits(expected, found, target=target, quantize=quantize))
        _write_config_and_processor(temporary, plain, processor)
        record = {"format": target, "quantize": quantize, **results[0]._asdict(), "versions": _versions(target)}
        record["weights"] = fingerprint_weights(model)
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (temporary / "export.json").write_text(text, encoding="utf-8")

    replace_folder(folder, write)
    return results[0]


def check_export(target: Format, quantize: Quantization) -> None:
    """Check before any work that the format can be written on this machine.

    Raises:
        RecipeError: The format cannot be quantized.
        MissingExtraError: A package is missing.
    """
    if quantize != "none" and FORMATS[target].quantize is None:
        allowed = " or ".join(name for name, entry in FORMATS.items() if entry.quantize is not None)
        raise RecipeError(f"--quantize {quantize} needs --format {allowed}, got --format {target}")
    for package in FORMATS[target].packages:
        require_package(package, f"--format {target}")


def fingerprint_weights(model: nn.Module) -> str:
    """Return the SHA-256 of all tensors of a model, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write_config_and_processor(
    folder: Path, model: IsoPruneForImageClassification, processor: BaseImageProcessor
) -> None:
    """Write labels and processor, which open with and without isoprune_hf like those of the model's own folder."""
    model.config.auto_map = {
        "AutoConfig": "modeling_isoprune.IsoPruneConfig",
        "AutoImageProcessor": "modeling_isoprune.IsoImageProcessor",
    }
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "modeling_isoprune.py").write_text(code_that_ships(), encoding="utf-8")


def _versions(target: Format) -> dict[str, str]:
    return {name: version(name) for name in ("torch", *FORMATS[target].packages)}
