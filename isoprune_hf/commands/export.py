"""The stage `export`: write a model for another runtime, and compare its outputs with PyTorch."""

from typing import Literal

from isoprune_hf.commands.flags import OVERWRITE, output_flag
from isoprune_hf.commands.stage import Answer, Flag, Heading, Stage


def run(
    *,
    folder: str,
    format: Literal["onnx", "openvino", "torch-export"],
    output: str,
    quantize: Literal["none", "dynamic"],
    overwrite: bool,
) -> Answer:
    """Export a model and report how far its logits are from those of PyTorch."""
    from isoprune_hf.checkpoint.target import open_target
    from isoprune_hf.export.export import check_export, export_model
    from isoprune_hf.models import load_base

    with open_target(output, overwrite=overwrite) as target:
        target.check_inputs({"--folder": folder})
        check_export(format, quantize)
        model, processor = load_base(folder)
        exported = export_model(model, processor, target, target=format, quantize=quantize)
    images = sum(exported.batches)
    file = target.path / exported.file
    text = (
        f"{file}: {format}{', weights of 8 bits' if quantize == 'dynamic' else ''}, any batch size\n"
        f"largest difference to PyTorch: {exported.difference:.3g}, logits up to {exported.largest:.3g} "
        f"({images} pictures in batches of {' and '.join(map(str, exported.batches))}); "
        f"the same class for {exported.same_class} of {images}"
    )
    figures = {
        "file": str(file),
        "format": format,
        "images": images,
        "difference": exported.difference,
        "largest": exported.largest,
        "same_class": exported.same_class,
    }
    return Answer(text, figures)


STAGE = Stage(
    name="export",
    run=run,
    text="Export a model to ONNX, OpenVINO or torch.export, compare its outputs with PyTorch, and write the folder "
    "OUTPUT.",
    heading=Heading.DELIVER,
    order=12,
    flags=(
        Flag("folder", str, None, "Folder of a model, or a name as for prune.model.", required=True),
        Flag("format", Literal["onnx", "openvino", "torch-export"], "onnx", "Format of the exported model."),
        output_flag("output/exported"),
        Flag("quantize", Literal["none", "dynamic"], "none", "dynamic: 8-bit weights of an ONNX model."),
        OVERWRITE,
    ),
    positional=("folder",),
    examples=("isoprune export finetuned --format onnx --output onnx",),
    is_local=True,
)
