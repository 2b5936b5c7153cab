"""Write the result of a stage: the folder with its card (`write_folder`), the table (`summarize`), the upload."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.folder import replace_file, save_model_folder, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import is_cut
from isoprune_hf.checkpoint.target import Target
from isoprune_hf.commands.stage import Answer
from isoprune_hf.commands.steps.recording import Records
from isoprune_hf.hub.uploads import Uploads
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.model_card import build_model_card
from isoprune_hf.reporting.ornaments import ornament
from isoprune_hf.reporting.tables import Metrics, on_same_images, results_table
from isoprune_hf.reporting.widths import PICTURE, can_draw, draw_widths, layer_widths
from isoprune_hf.tasks.registry import find_task


def write_folder(
    target: Target | Path,
    model: IsoPruneForImageClassification,
    processor: BaseImageProcessor,
    accelerator: Accelerator,
    records: Records | None = None,
) -> None:
    """Write the whole folder on the main process: model, figures and card appear together."""
    plan, speed, metrics = (records.plan, records.speed, records.metrics) if records else (None, None, None)
    name = (target.path if isinstance(target, Target) else target).name

    def finish(temporary: Path) -> None:
        if speed:
            write_file(temporary / "speed.json", json.dumps(speed, indent=2, sort_keys=True) + "\n")
        if model.config.stage == "base":
            return
        if can_draw() and any((model.config.structure or {}).values()):
            with ornament("the picture of the widths"):
                replace_file(temporary / PICTURE, partial(draw_widths, layer_widths(model), title=name))
        with ornament("the model card"):
            write_file(temporary / "README.md", str(build_model_card(temporary, repo=name)))

    accelerator.wait_for_everyone()  # every rank has checked the output by now
    if accelerator.is_main_process:
        save_model_folder(target, model, processor, plan=plan, metrics=metrics, finish=finish)
    accelerator.wait_for_everyone()


def figures_of_cut(plan: PruningPlan, base: IsoPruneConfig) -> dict[str, dict[str, float]]:
    """Return the figures of a cut by their rows in a table: `base` and `pruned`.

    Those of a model that was cut before are `before`: its base is another one, which is not measured here.

    Args:
        plan: Plan of the cut.
        base: Config of the model that was cut.
    """
    start = "before" if is_cut(base) else "base"
    return {start if name == "base" else name: dict(figures) for name, figures in plan.achieved.items()}


def summarize(
    model: IsoPruneForImageClassification,
    metrics: Metrics,
    latency: Mapping[str, float],
    folder: Path,
    *,
    notes: Sequence[str] = (),
    before: Mapping[str, float] | None = None,
) -> Answer:
    """Return the table of base, pruned and finetuned model, and the lines of code that open the folder.

    Args:
        model: The model in the folder.
        metrics: Results of evaluations, by stage.
        latency: Milliseconds, by stage.
        folder: The folder.
        notes: Notes of the plan, which follow the table.
        before: Figures of a model that was cut before, from which this cut began; it gets a row of its own.
    """
    costs = model.config.cost or {"base": count_cost(model).to_dict()}
    rows: dict[str, dict[str, Any]] = {}
    metrics = on_same_images(metrics, metrics.get(model.config.stage, {}))
    for name in ("base", "pruned", "finetuned"):
        cost = costs.get("base" if name == "base" else "pruned")
        if cost and (name in metrics or name in costs):
            speed = {"latency_ms": latency[name]} if name in latency else {}
            rows[name] = {**cost, **metrics.get(name, {}), **speed}
        if name == "base" and before is not None:
            rows["before"] = dict(before)
    imports = "" if model.config.layout == "uniform" else "    import isoprune_hf\n"
    opening = (
        f"The model is in {folder}. Open it with:\n\n"
        f"{imports}    from transformers import pipeline\n"
        f"    {find_task(model.config).code(folder)}\n"
    )
    text = "\n\n".join([results_table(rows), *(["\n".join(notes)] if notes else []), opening])
    return Answer(text, {"folder": str(folder), "models": rows, "notes": list(notes)})


def send_result(uploads: Uploads | None, folder: Path, answer: Answer) -> Answer:
    """Upload the result of a stage if that was requested, and add its address to the answer."""
    if uploads is None:
        return answer
    url = uploads.finish(folder)
    return replace(answer, text=f"{answer.text}\n\nIt is at {url}", figures={**answer.figures, "url": url})
