"""What a stage leaves behind: the folder with its card, and the lines on the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from accelerate import Accelerator
from PIL import Image
from transformers import BaseImageProcessor, pipeline

from isoprune_hf.checkpoint.folder import save_model_folder, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.reporting.model_card import build_model_card
from isoprune_hf.reporting.tables import results_table
from isoprune_hf.reporting.widths import PICTURE, can_draw, draw_widths, layer_widths

Metrics = dict[str, dict[str, float | int]]


class Answer(NamedTuple):
    """What a stage has to say.

    Args:
        text: For a reader.
        figures: The same for a program, as `--json` prints it.
        code: Exit code.
    """

    text: str
    figures: Mapping[str, Any] = MappingProxyType({})
    code: int = 0


def write_folder(
    folder: Path,
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    *,
    plan: str | None = None,
    metrics: Metrics | None = None,
    speed: dict[str, Any] | None = None,
    keep: str | None = None,
) -> None:
    """Write the whole folder on the main process: model, figures and card appear together."""

    def finish(temporary: Path) -> None:
        if speed:
            write_file(temporary / "speed.json", json.dumps(speed, indent=2, sort_keys=True) + "\n")
        if model.config.stage != "base":
            if can_draw() and any((model.config.structure or {}).values()):
                title = f"{folder.name}: the width of every layer, before and after the cut"
                draw_widths(layer_widths(model), temporary / PICTURE, title=title)
            write_file(temporary / "README.md", str(build_model_card(temporary, repo=folder.name)))

    accelerator.wait_for_everyone()  # each has looked at what is there
    if accelerator.is_main_process:
        save_model_folder(folder, model, processor, plan=plan, metrics=metrics, keep=keep, finish=finish)
    accelerator.wait_for_everyone()


def summarize(
    model: IsoPruneForImageClassification, metrics: Metrics, latency: dict[str, float], folder: Path
) -> Answer:
    """Give the table of base, pruned and finetuned, and say how to open the folder."""
    costs = model.config.cost or {"base": count_cost(model).to_dict()}
    rows = {}
    for name in ("base", "pruned", "finetuned"):
        cost = costs.get("base" if name == "base" else "pruned")
        if cost and (name in metrics or name in costs):
            speed = {"latency_ms": latency[name]} if name in latency else {}
            rows[name] = {**cost, **metrics.get(name, {}), **speed}
    imports = "" if model.config.layout == "uniform" else "    import isoprune_hf\n"
    opening = (
        f"The model is in {folder}. Open it with:\n\n"
        f"{imports}    from transformers import pipeline\n"
        f'    classify = pipeline("image-classification", model="{folder}")\n'
    )
    return Answer(f"{results_table(rows)}\n\n{opening}", {"folder": str(folder), "models": rows})


def try_out(folder: Path, images: ImageData) -> str:
    """Open the folder as a user would and classify one image that was held out."""
    example = images.evaluation[0]
    picture: Image.Image = example["image"].convert("RGB")
    best = pipeline("image-classification", model=str(folder))(picture)[0]
    truth = images.label_names[example["label"]]
    return f"pipeline on a held-out image: {best['label']} ({best['score']:.2f}), truth {truth}"
