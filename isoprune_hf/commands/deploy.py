"""The stages that take a finished folder elsewhere."""

import json
from pathlib import Path
from typing import Literal

import torch

from isoprune_hf.checkpoint.folder import check_output, read_json, write_file
from isoprune_hf.checkpoint.modeling_isoprune import code_that_ships
from isoprune_hf.commands.opening import open_source
from isoprune_hf.commands.results import Answer
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.export.comparison import Quantization
from isoprune_hf.export.export import check_export, export_model
from isoprune_hf.export.formats import Format
from isoprune_hf.hub.push import describe_push, published_files, push_folder, validate_push_options
from isoprune_hf.measuring.cases import BenchmarkSettings, RuntimeName
from isoprune_hf.measuring.runtimes import DType
from isoprune_hf.models import load_base
from isoprune_hf.pruning.doctor import check_model
from isoprune_hf.pruning.plan import PLAN_FILE, PruningPlan
from isoprune_hf.reporting.benchmark import benchmark_models, benchmark_text
from isoprune_hf.reporting.model_card import build_model_card


def run_export(folder: str, format: Format, output: str, quantize: Quantization, overwrite: bool) -> Answer:
    """Export a model to another runtime, and say how far its logits are from those of PyTorch."""
    target = check_output(output, overwrite=overwrite)
    if Path(folder).resolve() == target.resolve():
        raise RecipeError("--output must be another folder than the model's")
    check_export(format, quantize)
    model, processor = load_base(folder)
    done = export_model(model, processor, target, target=format, quantize=quantize)
    images = sum(done.batches)
    text = "\n".join(
        [
            f"{target / done.file}: {format}{', weights of 8 bits' if quantize == 'dynamic' else ''}, any batch size",
            f"largest difference to PyTorch: {done.difference:.3g}, logits up to {done.largest:.3g} "
            f"({images} photographs in batches of {' and '.join(map(str, done.batches))}); "
            f"the same class for {done.same_class} of {images}",
        ]
    )
    figures = {"difference": done.difference, "largest": done.largest, "same_class": done.same_class}
    return Answer(text, {"file": str(target / done.file), "format": format, "images": images, **figures})


def run_benchmark(
    folder: str,
    base: str | None,
    batch_sizes: list[int],
    dtypes: list[DType],
    runtimes: list[RuntimeName],
    repeats: int,
    seconds: float,
    threads: int | None,
    device: Literal["auto", "cpu", "cuda"],
) -> Answer:
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
    return Answer(benchmark_text(record), record)


def run_push(
    folder: str,
    repo: str,
    private: bool,
    revision: str | None,
    tag: str | None,
    collection: str | None,
    create_pr: bool,
    dry_run: bool,
    check: bool,
) -> str:
    """Upload a folder to the Hub; one that `doctor` would refuse stays here."""
    validate_push_options(repo, tag=tag, create_pr=create_pr, collection=collection)
    published_files(Path(folder))
    if check:
        _check_folder(Path(folder))
    wishes = {"revision": revision, "tag": tag, "create_pr": create_pr, "collection": collection}
    return describe_push(folder, repo, **wishes) if dry_run else push_folder(folder, repo, private=private, **wishes)


def _check_folder(folder: Path) -> None:
    """Check what a stranger will open: that it opens, that it is what it says, and that its code is ours."""
    opened = load_base(str(folder))
    plan = PruningPlan.load(folder) if (folder / PLAN_FILE).is_file() else None
    for finding in check_model(opened.model, opened.processor, plan):
        if finding.verdict == "FAIL":
            text = " ".join(finding.text.split())
            raise CheckpointError(f"{folder} is not pushed: {finding.check}: {text} (isoprune doctor {folder})")
    code = folder / "modeling_isoprune.py"
    if code.is_file() and code.read_text() != code_that_ships():
        raise CheckpointError(
            f"{folder} is not pushed: modeling_isoprune.py is not the code of this isoprune_hf; open and save the "
            "model anew, or push it with --check false"
        )


def _choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: this machine has no CUDA device; take cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
