"""Write the folder of an exported model: `check_export` first, then `export_model`.

The folder is kept only if the exported model returns the outputs of PyTorch, wherever its runtime exists.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.dense import describe_error
from isoprune_hf.checkpoint.finite import require_finite
from isoprune_hf.checkpoint.folder import replace_folder
from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, code_that_ships
from isoprune_hf.checkpoint.pretrained import PROCESSOR_PARTS
from isoprune_hf.checkpoint.target import Target
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.errors import ExportError, RecipeError
from isoprune_hf.export.comparison import Export, compare_outputs, without_comparison
from isoprune_hf.export.formats import FORMATS, Format, packages_of, precisions_of
from isoprune_hf.export.pictures import draw_pictures
from isoprune_hf.export.script import PROCESSOR_FILE, script_file, write_script
from isoprune_hf.export.sensitivity import DISTANCE, DIVERGENCE
from isoprune_hf.export.values import DTYPES, ExportPrecision
from isoprune_hf.extras import require_package
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.tracing import EXPORT_ERRORS, labels_of, output_names, plain_copy, run_traced, trace_model


def export_model(
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    folder: str | Path | Target,
    *,
    target: Format,
    precision: ExportPrecision = "fp32",
    calibration: Sequence[np.ndarray] = (),
    finish: Callable[[Path, Export, Run | None], None] | None = None,
) -> Export:
    """Write a folder with the exported model, its labels and its image processor, completely or not at all.

    The exported model maps `pixel_values` (B, C, H, W) in fp32 to `logits` (B, num_labels), or to the outputs of a
    network of another task by their names, for any batch size B unless its format takes one image
    (`ExportFormat.takes_batches`).

    Args:
        model: The model in eval mode; it is not changed.
        processor: Its image processor.
        folder: The folder, or the one that this process has locked; an existing one is replaced.
        target: A name in `FORMATS`.
        precision: int8 stores weights and activations in eight bits, with ranges of the calibration images, and layers
            that this would harm in fp32; int8-dynamic stores the weights alone in eight bits.
        calibration: Batches of pixels (B, C, H, W) of training images, for int8.
        finish: Writes further files into the new folder before it is renamed, given what was exported and the function
            that maps pixels to its outputs, None if this machine cannot run it.

    Raises:
        RecipeError: The format does not have the precision, or int8 has no calibration images.
        MissingExtraError: A package is missing.
        ExportError: The model cannot be exported, or its outputs differ from those of PyTorch.
        CheckpointError: The folder cannot be written, or a tensor is not finite.
    """
    check_export(target, precision, has_images=len(calibration) > 0)
    require_finite(model)
    batches = draw_pictures(processor) if precision != "int8" else _one_and_four(calibration)
    plain = plain_copy(model)
    outputs, labels, has_classes = output_names(plain), labels_of(plain), task_of(plain.config.base).has_classes
    expected = [run_traced(plain, pixels) for pixels in batches]
    results: list[Export] = []

    def write(temporary: Path) -> None:
        file = temporary / FORMATS[target].file
        try:
            program = trace_model(plain, torch.from_numpy(batches[-1]), DTYPES.get(precision, torch.float32))
            run = FORMATS[target].write(program, file, labels, outputs)
            quantization: Mapping[str, Any] = {}
            if precision in FORMATS[target].quantizers:
                run, quantization = (
                    FORMATS[target]
                    .quantizers[precision]
                    .quantize(program, file, calibration, DIVERGENCE if has_classes else DISTANCE)
                )
            found = [run(pixels) for pixels in batches] if run is not None else None
        except ExportError:
            raise
        except EXPORT_ERRORS as error:
            raise ExportError(f"the model cannot be exported to {target}: {describe_error(error)}") from error
        if found is None:
            results.append(without_comparison(target, outputs))
        else:
            compared = compare_outputs(
                expected, found, target=target, precision=precision, outputs=outputs, has_classes=has_classes
            )
            results.append(compared._replace(quantization=quantization))
        _write_config_and_processor(temporary, plain, processor)
        record = {
            "format": target,
            "precision": precision,
            **results[0]._asdict(),
            "versions": _versions(target, precision),
        }
        record["weights"] = fingerprint_weights(model)
        _write_text(temporary / "export.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
        script = write_script(FORMATS[target], processor, outputs, has_classes=has_classes)
        _write_text(temporary / script_file(has_classes=has_classes), script)
        if finish is not None:
            finish(temporary, results[0], run)

    replace_folder(folder, write)
    return results[0]


def check_export(target: Format, precision: ExportPrecision, *, has_images: bool) -> None:
    """Check before any work that the format can be written on this machine.

    Raises:
        RecipeError: The format does not have the precision, int8 has no calibration images, or this machine cannot
            run the format on images.
        MissingExtraError: A package is missing.
    """
    if precision not in precisions_of(target):
        allowed = " or ".join(name for name in FORMATS if precision in precisions_of(name))
        raise RecipeError(f"--precision {precision} needs --format {allowed}, got --format {target}")
    if precision == "int8" and not has_images:
        raise RecipeError("--precision int8 measures ranges on training images: set --data, or use fp16")
    limitation = FORMATS[target].limitation
    if has_images and limitation is not None:
        raise RecipeError(f"--data measures the accuracy of the exported model, and {limitation}: omit --data")
    for package in packages_of(target, precision):
        is_of_format = package in FORMATS[target].packages
        require_package(package, f"--format {target}" + ("" if is_of_format else f" --precision {precision}"))


def _one_and_four(calibration: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return a batch of one calibration image and one of up to four others."""
    images = np.concatenate([batch[:5] for batch in calibration[:5]])[:5]
    return [images[:1], images[-4:]]


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
    _write_text(folder / "modeling_isoprune.py", code_that_ships())
    if isinstance(processor, IsoImageProcessor):
        _write_text(folder / PROCESSOR_FILE, code_that_ships(PROCESSOR_PARTS))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def _versions(target: Format, precision: ExportPrecision) -> dict[str, str]:
    return {name: version(name) for name in ("torch", *packages_of(target, precision))}
