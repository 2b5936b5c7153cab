"""What a stage leaves behind: the folder with its card, and the lines on the terminal."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from transformers import BaseImageProcessor, pipeline

from isoprune_hf.checkpoint.folder import save_model_folder, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.cost import ModelCost
from isoprune_hf.publishing.model_card import build_model_card
from isoprune_hf.publishing.report import results_table
from isoprune_hf.training.data import ImageData

Metrics = dict[str, dict[str, float | int]]


def write_folder(
    folder: Path,
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    *,
    plan: str | None = None,
    metrics: Metrics | None = None,
    latency: dict[str, float] | None = None,
) -> None:
    if accelerator.is_main_process:
        kept = folder / "checkpoints"
        save_model_folder(folder, model, processor, plan=plan, metrics=metrics, keep=kept if kept.is_dir() else None)
        if latency:
            where = "cpu" if accelerator.device.type == "cpu" else torch.cuda.get_device_name(accelerator.device)
            record = {"milliseconds": latency, "device": where, "threads": torch.get_num_threads(), "batch_size": 1}
            write_file(folder / "speed.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
        if model.config.stage != "base":
            write_file(folder / "README.md", str(build_model_card(folder)))
    accelerator.wait_for_everyone()


def summarize(model: IsoPruneForImageClassification, metrics: Metrics, latency: dict[str, float], folder: Path) -> str:
    cost = {name: ModelCost(**values) for name, values in model.config.cost.items()}
    rows = {
        name: {
            **cost["base" if name == "base" else "pruned"].to_dict(),
            **metrics.get(name, {}),
            **({"latency_ms": latency[name]} if name in latency else {}),
        }
        for name in ("base", "pruned", "finetuned")
        if name in metrics or name in cost
    }
    opening = (
        f"The pruned model is in {folder}. Open it with:\n\n"
        "    import isoprune_hf\n"
        "    from transformers import pipeline\n"
        f'    classify = pipeline("image-classification", model="{folder}")\n'
    )
    return f"{results_table(rows)}\n\n{opening}"


def try_out(folder: Path, images: ImageData) -> str:
    """Open the folder as a user would and classify one image that was held out."""
    example = images.evaluation[0]
    picture: Image.Image = example["image"].convert("RGB")
    best = pipeline("image-classification", model=str(folder))(picture)[0]
    truth = images.label_names[example["label"]]
    return f"pipeline on a held-out image: {best['label']} ({best['score']:.2f}), truth {truth}"
