"""The stage `export`: write a model for another runtime, compare it with PyTorch, and measure its accuracy."""

from pathlib import Path
from typing import Literal

from isoprune_hf.commands.flags import OVERWRITE, output_flag
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import DataRecipe


def run(
    *,
    data: DataRecipe,
    folder: str,
    format: Literal["onnx", "openvino", "torch-export", "executorch", "litert", "coreml"],
    output: str,
    precision: Literal["fp32", "fp16", "bf16", "int8", "int8-dynamic"],
    calibration_images: int,
    overwrite: bool,
) -> Answer:
    """Export a model, and report how far its outputs are from those of PyTorch, and its figures with images."""
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.checkpoint.task_forms import TASK_FORMS
    from isoprune_hf.commands.steps.exporting import open_export_images, write_results
    from isoprune_hf.export.comparison import Export
    from isoprune_hf.export.export import check_export, export_model
    from isoprune_hf.measuring.runtimes.onnx_runtime import Run
    from isoprune_hf.models import load_base
    from isoprune_hf.reporting.export_text import describe_export
    from isoprune_hf.reporting.tables import Metrics

    if calibration_images < 1:
        raise RecipeError(f"--calibration_images must be at least 1, got {calibration_images}")
    with open_target(output, overwrite=overwrite) as target:
        target.check_inputs({"--folder": folder, "data.dataset": data.dataset})
        check_export(format, precision, has_images=data.dataset is not None)
        base = load_base(folder, tasks=TASK_FORMS)
        images = open_export_images(data, base) if data.dataset is not None else None
        base = base if images is None else images.base
        metrics: Metrics = {}

        def finish(temporary: Path, exported: Export, run: Run | None) -> None:
            if images is not None and run is not None:
                metrics.update(images.measure(run, precision))
            write_results(temporary, target.path.name, exported, metrics)

        calibration = images.calibration(calibration_images) if images is not None and precision == "int8" else ()
        exported = export_model(
            *base, target, target=format, precision=precision, calibration=calibration, finish=finish
        )
    figures = {
        "file": str(target.path / exported.file),
        "format": format,
        "precision": precision,
        "images": sum(exported.batches),
        **{key: value for key, value in exported._asdict().items() if key not in ("file", "batches")},
        "models": metrics,
    }
    return Answer(describe_export(target.path / exported.file, format, precision, exported, metrics), figures)


STAGE = Stage(
    name="export",
    run=run,
    text="Export a model to ONNX, OpenVINO, torch.export, ExecuTorch, LiteRT or Core ML, compare its outputs with "
    "PyTorch, measure its accuracy in its own runtime if there are images, and write the folder OUTPUT.",
    heading=Heading.DELIVER,
    order=12,
    flags=(
        Flag("folder", str, None, "Folder of a model, or a name as for prune.model.", required=True),
        Flag(
            "format",
            Literal["onnx", "openvino", "torch-export", "executorch", "litert", "coreml"],
            "onnx",
            "Format of the exported model.",
        ),
        output_flag("output/exported"),
        Flag(
            "precision",
            Literal["fp32", "fp16", "bf16", "int8", "int8-dynamic"],
            "fp32",
            "int8 needs --data for its ranges; int8-dynamic stores the weights alone in 8 bits, in ONNX.",
        ),
        Flag(
            "calibration_images",
            int,
            256,
            "Training images for int8: its ranges, and a quarter (at most 64) to choose its layers.",
        ),
        OVERWRITE,
    ),
    sections=("data",),
    positional=("folder",),
    examples=(
        "isoprune export finetuned --format onnx --output onnx",
        "isoprune export finetuned --precision int8 --data DIR --output int8",
    ),
    is_local=True,
)
