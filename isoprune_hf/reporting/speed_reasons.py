"""Why a network is not faster by what its MACs promise: what its layers are like, said in one sentence."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.speed import draw_images

# Registers of a CPU hold 8 or 16 numbers of fp32, a tile of a GPU's matrix unit 16 or more.
_MULTIPLES = (8, 16, 32)
_NARROW = 64
_NOTABLE = 0.05


def look_at_layers(model: IsoPruneForImageClassification) -> dict[str, Any]:
    """Describe the linear layers and convolutions of a model by shares of their MACs.

    Returns:
        `narrow`: share in layers with a width below 64 (the classes and the channels of an image do not count);
        `depthwise`: share in convolutions of one channel each; `unaligned`: multiple -> share in layers with a width
        that is none. All three are fractions of the MACs of these layers.
    """
    layers = _measure_layers(model)
    total = sum(macs for _, macs in layers) or 1
    open_widths = [(_widths(module, model), macs) for module, macs in layers]
    return {
        "narrow": sum(macs for widths, macs in open_widths if widths and min(widths) < _NARROW) / total,
        "depthwise": sum(macs for module, macs in layers if _is_depthwise(module)) / total,
        "unaligned": {
            str(multiple): sum(macs for widths, macs in open_widths if any(w % multiple for w in widths)) / total
            for multiple in _MULTIPLES
        },
    }


def explain_speed(record: Mapping[str, Any]) -> str:
    """Say in one sentence why the measured gain is not the promised one, and which `round_to` would help.

    Args:
        record: `promised`, `rows` and `layers` of a benchmark.
    """
    shares = sorted(row["of_promised"] for row in record["rows"])
    least, most = f"{shares[0]:.2f}", f"{shares[-1]:.2f}"
    range_of = least if least == most else f"{least} to {most}"
    start = f"The clock gives {range_of} of the {record['promised']:.2f}x that MACs promise"
    layers, causes = record["layers"], []
    multiple = advise_multiple(layers)
    if multiple is not None:
        share = layers["unaligned"][str(multiple)]
        causes.append(f"{share:.0%} of the MACs are in layers whose widths are no multiples of {multiple}")
    if layers["narrow"] > _NOTABLE:
        causes.append(f"{layers['narrow']:.0%} are in layers narrower than {_NARROW}, which leave units idle")
    if layers["depthwise"] > _NOTABLE:
        causes.append(f"{layers['depthwise']:.0%} are in depthwise convolutions, which wait for memory")
    causes.append("norms, activations and copies cost time but no MACs, and small batches the time of every call")
    advice = "no round_to would align it better" if multiple is None else f"--prune.round_to {multiple} would help"
    return f"{start}: {', '.join(causes)}; {advice}."


def advise_multiple(layers: Mapping[str, Any]) -> int | None:
    """Give the smallest multiple that a notable share of the layers does not have; None where all have them."""
    return next((m for m in _MULTIPLES if layers["unaligned"][str(m)] > _NOTABLE), None)


def _measure_layers(model: IsoPruneForImageClassification) -> list[tuple[nn.Module, int]]:
    """Run one image, and give each layer with its MACs."""
    found: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        # Every output element is the product of one row of the weight with the input.
        found.append((module, output.numel() * module.weight[0].numel()))

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    try:
        with torch.inference_mode():
            model(draw_images(model, model.config.image_size, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_depthwise(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear) and module.groups == module.in_channels > 1


def _widths(module: nn.Module, model: IsoPruneForImageClassification) -> list[int]:
    """The widths that a cut could have chosen: neither the channels of the image nor the classes."""
    rows, columns = module.weight.shape[:2]
    fixed = {model.config.image_size[0], model.config.num_labels}
    widths = [rows] if _is_depthwise(module) else [rows, columns]
    return [width for width in widths if width not in fixed]
