"""The stages that take a finished folder elsewhere."""

from pathlib import Path

from isoprune_hf.checkpoint.folder import check_output
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.publishing.export import Format, Quantization, check_export, export_model


def run_export(folder: str, format: Format, output: str, quantize: Quantization, overwrite: bool) -> str:
    """Export a model to another runtime, and say how far its logits are from those of PyTorch."""
    target = check_output(output, overwrite=overwrite)
    if Path(folder).resolve() == target.resolve():
        raise RecipeError("--output must be another folder than the model's")
    check_export(format, quantize)
    model, processor = load_base(folder)
    done = export_model(model, processor, target, target=format, quantize=quantize)
    images = sum(done.batches)
    return "\n".join(
        [
            f"{target / done.file}: {format}{', weights of 8 bits' if quantize == 'dynamic' else ''}, any batch size",
            f"largest difference to PyTorch: {done.difference:.3g}, logits up to {done.largest:.3g} "
            f"({images} photographs in batches of {' and '.join(map(str, done.batches))}); "
            f"the same class for {done.same_class} of {images}",
        ]
    )
