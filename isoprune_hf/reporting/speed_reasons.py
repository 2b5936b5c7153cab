"""Explain why a pruned network is not faster by the factor that its MACs promise.

`describe_layers` measures the shares of unfavourable layers, `explain_speed_gap` turns them into one sentence.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.measuring.images import draw_images

# A CPU register holds 8 or 16 fp32 numbers; a tile of a GPU's matrix unit has 16 or more rows.
_ALIGNMENTS = (8, 16, 32)
_NARROW_WIDTH = 64
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
    """
    costs = _measure_layers(model)
    total = sum(cost.macs for cost in costs) or 1
    return {
        "narrow": sum(cost.macs for cost in costs if cost.widths and min(cost.widths) < _NARROW_WIDTH) / total,
        "depthwise": sum(cost.macs for cost in costs if _is_depthwise(cost.layer)) / total,
        "unaligned": {
            str(multiple): sum(cost.macs for cost in costs if any(width % multiple for width in cost.widths)) / total
            for multiple in _ALIGNMENTS
        },
    }


def explain_speed_gap(record: Mapping[str, Any]) -> str:
    """Return one sentence: why the measured speed-up differs from the promised one, and which `round_to` would help.

    Args:
        record: `promised`, `rows` and `layers` of a benchmark.
    """
    shares = sorted(row["of_promised"] for row in record["rows"])
    lowest, highest = f"{shares[0]:.2f}", f"{shares[-1]:.2f}"
    measured = lowest if lowest == highest else f"{lowest} to {highest}"
    layers = record["layers"]
    causes = []
    multiple = advise_multiple(layers)
    if multiple is not None:
        share = layers["unaligned"][str(multiple)]
        causes.append(f"{share:.0%} of the MACs are in layers whose widths are not multiples of {multiple}")
    if layers["narrow"] > _MIN_NOTABLE_SHARE:
        causes.append(f"{layers['narrow']:.0%} are in layers narrower than {_NARROW_WIDTH}, which leave units idle")
    if layers["depthwise"] > _MIN_NOTABLE_SHARE:
        causes.append(
            f"{layers['depthwise']:.0%} are in depthwise convolutions, which are limited by memory bandwidth"
        )
    causes.append("norms, activations and copies take time but have no MACs, and small batches pay for every call")
    advice = "no round_to improves the alignment" if multiple is None else f"--prune.round_to {multiple} would help"
    start = f"The measured speed-up is {measured} of the {record['promised']:.2f}x that the MACs promise"
    return f"{start}: {', '.join(causes)}; {advice}."


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
