"""The stages that take a finished folder elsewhere."""

import json
from pathlib import Path
from typing import Literal

import torch

from isoprune_hf.checkpoint.folder import check_output, read_json, write_file
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.publishing.benchmark import BenchmarkSettings, Runtime, Width, benchmark_models, benchmark_text
from isoprune_hf.publishing.export import Format, Quantization, check_export, export_model
from isoprune_hf.publishing.model_card import build_model_card
from isoprune_hf.sources import open_source


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


def run_benchmark(
    folder: str,
    base: str | None,
    batch_sizes: list[int],
    dtypes: list[Width],
    runtimes: list[Runtime],
    repeats: int,
    seconds: float,
    threads: int | None,
    device: Literal["auto", "cpu", "cuda"],
) -> str:
    """Measure a folder's model against its base; the folder keeps the figures, and its card shows them."""
    config = read_json(folder, "config.json") or {}
    if config.get("model_type") != "isoprune" or config.get("stage", "base") == "base":
        raise RecipeError(f"--folder {folder} is no folder of a pruned model: there is nothing to compare")
    settings = BenchmarkSettings(batch_sizes, dtypes, runtimes, repeats, seconds)
    place = _choose_device(device)
    if threads is not None and threads < 1:
        raise RecipeError(f"threads must be at least 1, got {threads}")
    pruned = load_base(folder).model
    dense = open_source(pruned, base).model
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        record = benchmark_models(dense.to(place), pruned.to(place), settings)
    finally:
        torch.set_num_threads(before)
    speed = {**(read_json(folder, "speed.json") or {}), "benchmark": record}
    write_file(Path(folder) / "speed.json", json.dumps(speed, indent=2, sort_keys=True) + "\n")
    write_file(Path(folder) / "README.md", str(build_model_card(folder)))
    return benchmark_text(record)


def _choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: this machine has no CUDA device; take cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
