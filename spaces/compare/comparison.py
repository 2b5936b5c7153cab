"""Compare a pruned model with its base.

`open_pair` opens both, `compare` answers for an image and `caption` in one line, `headline` and `tabulate` show gain
and costs, `list_examples` finds photographs to begin with.
"""

import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from transformers import BaseImageProcessor

from isoprune_hf import (
    CheckpointError,
    DataRecipe,
    IsoPruneError,
    IsoPruneForImageClassification,
    load_base,
    load_data,
)
from isoprune_hf.commands.steps.recording import read_records
from isoprune_hf.commands.steps.sources import open_source
from isoprune_hf.data.decoding import DECODE_ERRORS, decode_image
from isoprune_hf.measuring.speed import measure_latency
from isoprune_hf.plain_files import read_json
from isoprune_hf.recipes.values import MULTI_LABEL
from isoprune_hf.reporting.plain_text import plain_markdown
from isoprune_hf.reporting.tables import on_same_images
from isoprune_hf.reporting.widths import PICTURE, draw_widths, layer_widths

TOP = 5
_LABEL_SIGNS = 80
MAX_EXAMPLES = 6
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
KEPT = {"macs": "MACs", "params": "parameters"}


class Pair(NamedTuple):
    """A pruned model and its base.

    Args:
        name: Folder or repository of the pruned model.
        models: `base` and `pruned`, in eval mode.
        processors: The image processor of each model.
        widths: PNG of the width of every layer, before and after pruning.
        milliseconds: Model -> median time of a forward pass of one image, measured in turns when the pair is opened.
        accuracy: Model -> measured top-1 or mean average precision (fractions) on the same images; empty if it is not
            known of both.
        examples: Images to begin with.
    """

    name: str
    models: dict[str, IsoPruneForImageClassification]
    processors: dict[str, BaseImageProcessor]
    widths: Path
    milliseconds: dict[str, float]
    accuracy: dict[str, float]
    examples: list[Path]


class Comparison(NamedTuple):
    """The answers of both models for an image.

    Args:
        image: The decoded image, upright and in RGB.
        answers: Model -> label -> probability, highest first.
        is_multi_label: Each label has a probability of its own.
    """

    image: Image.Image
    answers: dict[str, dict[str, float]]
    is_multi_label: bool = False


def open_pair(name: str, base: str | None = None) -> Pair:
    """Open a pruned model and its base.

    Args:
        name: A folder, or a repository of the Hub.
        base: Folder or repository of the base, if it has moved since pruning.

    Raises:
        IsoPruneError: A model cannot be opened, or the base is not that of the pruned model.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name))
        except (HFValidationError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{name} is neither a folder nor a repository of the Hub that can be opened ({reason})"
            ) from error
    opened = load_base(str(folder))
    dense = open_source(opened.model, base)
    widths = folder / PICTURE
    if not widths.is_file():
        widths = Path(tempfile.mkdtemp()) / PICTURE
        draw_widths(layer_widths(opened.model), widths, title=folder.resolve().name)
    models = {"base": dense.model.eval(), "pruned": opened.model.eval()}
    return Pair(
        name,
        models,
        {"base": dense.processor, "pruned": opened.processor},
        widths,
        measure_latency(models, opened.model.config.image_size),
        _read_accuracy(folder, opened.model.config.stage),
        list_examples(folder),
    )


def compare(pair: Pair, encoded: bytes) -> Comparison:
    """Classify an image file with both models.

    Args:
        pair: The models.
        encoded: Content of the file.

    Raises:
        IsoPruneError: The file is not an image, is damaged, or has too many pixels.
    """
    try:
        image = decode_image(encoded)
    except IsoPruneError:
        raise
    except DECODE_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise IsoPruneError(f"this file cannot be read as an image ({reason}); try a JPEG or a PNG") from error
    answers, is_multi_label = {}, has_lists(pair)
    for name, model in pair.models.items():
        pixels = pair.processors[name](image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = model(pixels.to(model.device)).logits[0].float()
        probabilities = logits.sigmoid() if is_multi_label else logits.softmax(dim=0)
        best = probabilities.topk(min(TOP, len(probabilities)))
        places = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        labels = show_labels(model.config.id2label)
        answers[name] = {labels[index]: probability for index, probability in places}
    return Comparison(image, answers, is_multi_label)


def has_lists(pair: Pair) -> bool:
    """Return whether the models give each label a probability of its own, by the config of the pruned one."""
    return pair.models["pruned"].config.problem_type == MULTI_LABEL


def show_labels(names: dict[int, str]) -> dict[int, str]:
    """Return the names of classes as short lines of printable signs; those of several classes get their numbers.

    The names come from the config of a stranger. gradio shows them as text and not as HTML, but in any length.
    """
    lines = {
        index: " ".join("".join(sign if sign.isprintable() else " " for sign in name[:_LABEL_SIGNS]).split()) or "?"
        for index, name in names.items()
    }
    counts = Counter(lines.values())
    return {index: line if counts[line] == 1 else f"{line} ({index})" for index, line in lines.items()}


def summarize(found: Comparison) -> str:
    """Return as Markdown which classes both models predict; names stand in code, where nothing is a link or a tag."""
    base, pruned = (
        ", ".join(f"`{plain_markdown(label)}`" for label, _ in predicted(found, name)) or "no class"
        for name in ("base", "pruned")
    )
    return f"Both predict {base}." if base == pruned else f"The base predicts {base}, the pruned model {pruned}."


def predicted(found: Comparison, name: str) -> list[tuple[str, float]]:
    """Return what a model predicts, with the probability: the first class, or of several those above 1/2."""
    answers = [*found.answers[name].items()]
    return [(label, chance) for label, chance in answers if chance > 0.5] if found.is_multi_label else answers[:1]


def answer_examples(pair: Pair) -> list[tuple[str, str]]:
    """Return the example images that can be read, each with its caption."""
    answered = []
    for path in pair.examples:
        with suppress(IsoPruneError, OSError):
            answered.append((str(path), caption(compare(pair, path.read_bytes()))))
    return answered


def list_examples(folder: Path) -> list[Path]:
    """Return the images in `examples`, beside the model or beside this file; of the demo's model, held-out digits."""
    for place in (folder / "examples", Path(__file__).parent / "examples"):
        found = sorted(path for path in place.glob("*") if path.suffix.lower() in SUFFIXES)
        if found:
            return found[:MAX_EXAMPLES]
    recorded = (read_json(folder / "config.json").get("recipe") or {}).get("data") or {}
    if recorded.get("dataset") != "digits":
        return []
    images, place = load_data(DataRecipe(dataset="digits")), Path(tempfile.mkdtemp())
    for number, row in zip(range(MAX_EXAMPLES), images.evaluation, strict=False):
        row["image"].resize((64, 64)).save(place / f"{number}-{images.label_names[row['label']]}.png")
    return sorted(place.iterdir())


def caption(found: Comparison) -> str:
    """Return what both models predict, and with which probabilities, in one line."""
    lines = {
        name: ", ".join(f"{label} {chance:.0%}" for label, chance in predicted(found, name)) or "no class"
        for name in found.answers
    }
    return " | ".join(f"{name}: {line}" for name, line in lines.items())


def headline(pair: Pair) -> str:
    """Return what pruning gained and cost in one sentence; accuracy is left out if it was not measured."""
    cost, times = pair.models["pruned"].config.cost, pair.milliseconds
    gains = [f"{cost['pruned'][key] / cost['base'][key]:.0%} of the {name}" for key, name in KEPT.items()]
    text = f"{' and '.join(gains)}, {times['base'] / times['pruned']:.2f}x as fast on this machine"
    if pair.accuracy:
        what = "mean average precision" if has_lists(pair) else "right"
        text += f", {pair.accuracy['pruned']:.1%} {what} instead of {pair.accuracy['base']:.1%}"
    return text


def _read_accuracy(folder: Path, stage: str) -> dict[str, float]:
    """Return top-1 or mean average precision of both models if they were measured on the same images."""
    metrics = read_records(str(folder)).metrics
    shown = on_same_images(metrics, metrics.get(stage, {}))
    rows = {"base": shown.get("base", {}), "pruned": shown.get(stage, {})}
    found = {name: row.get("top1", row.get("map")) for name, row in rows.items()}
    return {name: float(value) for name, value in found.items() if value is not None} if all(found.values()) else {}


def tabulate(pair: Pair) -> str:
    """Return a Markdown table of MACs, parameters and time of both models, and the remaining share."""
    cost = pair.models["pruned"].config.cost
    rows = {
        "GMACs": [cost[name]["macs"] / 1e9 for name in pair.models],
        "params (M)": [cost[name]["params"] / 1e6 for name in pair.models],
        "ms an image": [pair.milliseconds[name] for name in pair.models],
    }
    lines = ["| | base | pruned | left |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {base:.3g} | {pruned:.3g} | {pruned / base:.0%} |" for name, (base, pruned) in rows.items()]
    return "\n".join(lines)
