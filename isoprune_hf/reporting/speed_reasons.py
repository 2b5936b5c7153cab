"""Explain why a pruned network is not faster by the factor that its MACs promise.

`describe_layers` counts the shares of unfavourable layers; `explain_speed_gap` says them, and where the time goes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.measuring.images import draw_images
from isoprune_hf.measuring.runtimes.registry import ENGINES
from isoprune_hf.recipes.values import RuntimeName

# A CPU register holds 8 or 16 fp32 numbers; a tile of a GPU's matrix unit has 16 or more rows.
_ALIGNMENTS = (8, 16, 32)
_NARROW_WIDTH = 64
# ONNX Runtime computes convolutions in blocks of channels (NCHWc) only if their widths are multiples of this.
_BLOCK = 8
_SHOWN_MODULES = 3
_MIN_NOTABLE_SHARE = 0.05  # of the MACs; smaller shares are not mentioned

Layer = nn.Linear | nn.Conv1d | nn.Conv2d


class _LayerCost(NamedTuple):
    """A layer, the widths of it that pruning can choose, and its MACs for one image."""

    layer: Layer
    widths: list[int]
    macs: int


def describe_layers(model: IsoPruneForImageClassification) -> dict[str, Any]:
    """Return which shares of the MACs lie in layers that hardware runs inefficiently.

    Args:
        model: The model in eval mode; it is not changed.

    Returns:
        `narrow`: share in layers with a width below 64 (image channels and classes are not counted as widths);
        `depthwise`: share in convolutions with one input channel per group; `unaligned`: multiple -> share in layers
        with a width that is not a multiple of it. All are fractions of the MACs of linear layers and convolutions.
        `convolutions`: their number; `unblocked`: how many of them have a width that is not a multiple of 8.
    """
    costs = _measure_layers(model)
    convolutions = [cost for cost in costs if not isinstance(cost.layer, nn.Linear)]
    total = sum(cost.macs for cost in costs) or 1
    return {
        "narrow": sum(cost.macs for cost in costs if cost.widths and min(cost.widths) < _NARROW_WIDTH) / total,
        "depthwise": sum(cost.macs for cost in costs if _is_depthwise(cost.layer)) / total,
        "unaligned": {
            str(multiple): sum(cost.macs for cost in costs if any(width % multiple for width in cost.widths)) / total
            for multiple in _ALIGNMENTS
        },
        "convolutions": len(convolutions),
        "unblocked": sum(any(width % _BLOCK for width in cost.widths) for cost in convolutions),
    }


def explain_speed_gap(record: Mapping[str, Any]) -> str:
    """Return in words how far the measured speed-up is from the promised one, and where the time goes.

    Args:
        record: `promised`, `rows`, `layers` and `modules` of a benchmark.
    """
    shares = sorted(row["of_promised"] for row in record["rows"])
    lowest, highest = f"{shares[0]:.2f}", f"{shares[-1]:.2f}"
    measured = lowest if lowest == highest else f"{lowest} to {highest}"
    largest = [f"{share:.0%} in {name}" for name, share in list(record["modules"].items())[:_SHOWN_MODULES]]
    sentences = [
        f"The measured speed-up is {measured} of the {record['promised']:.2f}x that the MACs promise",
        f"Of an eager pass of the pruned model, torch.profiler finds {', '.join(largest)}",
    ]
    slower = _describe_slower(record)
    if slower is not None:
        sentences.append(slower)
    layout = _share_of_eager(record["rows"])
    if layout is not None:
        sentences.append(f"In channels_last, with folded BatchNorm, it takes {layout:.2f} of its eager time")
    multiple = advise_multiple(record["layers"])
    if multiple is not None:
        share = record["layers"]["unaligned"][str(multiple)]
        sentences.append(
            f"{share:.0%} of the MACs are in layers whose widths are not multiples of {multiple}, which "
            f"--prune.round_to {multiple} would align"
        )
    return ". ".join(sentences) + "."


def _describe_slower(record: Mapping[str, Any]) -> str | None:
    """Return in which runtimes the pruned model is slower than its base, and why in ONNX Runtime; None if in none."""
    shares: dict[RuntimeName, float] = {}
    for row in record["rows"]:
        if row["faster"] < 1:
            shares[row["runtime"]] = min(row["faster"], shares.get(row["runtime"], 1.0))
    if not shares:
        return None
    places = [f"{ENGINES[name].label} ({share:.2f}x)" for name, share in shares.items()]
    unblocked, convolutions = record["layers"]["unblocked"], record["layers"]["convolutions"]
    reason = (
        f": {unblocked} of its {convolutions} convolutions have widths that are not multiples of {_BLOCK}, which ONNX "
        f"Runtime computes without its blocks of channels"
        if "onnxruntime" in shares and unblocked
        else ""
    )
    return f"It is slower than its base in {', '.join(places)}{reason}"


def _share_of_eager(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the smallest time of the pruned model in channels_last, as a share of its eager time in the same case."""
    times = {(row["runtime"], row["dtype"], row["batch_size"]): row["pruned"]["median"] for row in rows}
    shares = [
        time / times["eager", *case]
        for (name, *case), time in times.items()
        if name == "channels_last" and ("eager", *case) in times
    ]
    return min(shares, default=None)


def advise_multiple(layers: Mapping[str, Any]) -> int | None:
    """Return the smallest multiple that a notable share of the layers is not aligned to, or None.

    Args:
        layers: Result of `describe_layers`.
    """
    return next((m for m in _ALIGNMENTS if layers["unaligned"][str(m)] > _MIN_NOTABLE_SHARE), None)


def _measure_layers(model: IsoPruneForImageClassification) -> list[_LayerCost]:
    """Run one image and return the cost of each layer."""
    size = image_size_of(model)
    unpruned = {size[0], model.config.num_labels}
    costs: list[_LayerCost] = []

    def record(module: Layer, _: Any, output: torch.Tensor) -> None:
        # Every output element is the product of one row of the weight with the input.
        macs = output.numel() * module.weight[0].numel()
        rows, columns = module.weight.shape[:2]
        widths = [rows] if _is_depthwise(module) else [rows, columns]
        costs.append(_LayerCost(module, [width for width in widths if width not in unpruned], macs))

    hooks = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, Layer)]
    try:
        with torch.inference_mode():
            model(draw_images(model, size, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def _is_depthwise(layer: Layer) -> bool:
    return not isinstance(layer, nn.Linear) and layer.groups == layer.in_channels > 1
