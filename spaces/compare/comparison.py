"""Compare a pruned model with its base: `open_pair`, `compare` (answers for an image) and `tabulate` (costs)."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from transformers import BaseImageProcessor

from isoprune_hf import CheckpointError, IsoPruneError, IsoPruneForImageClassification, load_base
from isoprune_hf.commands.steps.sources import open_source
from isoprune_hf.data.decoding import DECODE_ERRORS, decode_image
from isoprune_hf.measuring.speed import measure_latency
from isoprune_hf.reporting.widths import PICTURE, draw_widths, layer_widths

TOP = 5


class Pair(NamedTuple):
    """A pruned model and its base.

    Args:
        name: Folder or repository of the pruned model.
        models: `base` and `pruned`, in eval mode.
        processors: The image processor of each model.
        widths: PNG of the width of every layer, before and after pruning.
        milliseconds: Model -> median time of a forward pass of one image, measured in turns when the pair is opened.
    """

    name: str
    models: dict[str, IsoPruneForImageClassification]
    processors: dict[str, BaseImageProcessor]
    widths: Path
    milliseconds: dict[str, float]


class Comparison(NamedTuple):
    """The answers of both models for an image.

    Args:
        image: The decoded image, upright and in RGB.
        answers: Model -> label -> probability, highest first.
    """

    image: Image.Image
    answers: dict[str, dict[str, float]]


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
    answers = {}
    for name, model in pair.models.items():
        pixels = pair.processors[name](image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            probabilities = model(pixels.to(model.device)).logits[0].float().softmax(dim=0)
        best = probabilities.topk(min(TOP, len(probabilities)))
        places = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        answers[name] = {model.config.id2label[index]: probability for index, probability in places}
    return Comparison(image, answers)


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
