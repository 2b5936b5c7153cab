"""Quantise a model with as few layers in fp32 as its predictions need: `hold_out`, then `quantize_bounded`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from isoprune_hf.errors import ExportError
from isoprune_hf.export.sensitivity import DIVERGENCE, Harm, Nodes, Unit, choose_left_out
from isoprune_hf.measuring.runtimes.onnx_runtime import Run

MAX_DIVERGENCE = 0.02  # nats; EfficientNet-Lite0 loses 0.2 points of top-1 at 0.01
MAX_DISTANCE = 0.01  # of the squared norm: a cosine similarity of about 0.995
_HELD_OUT = 64
_MAX_UNITS = 32  # of layers with weights
_MIN_SHARE = 0.5  # of the weights that must be stored in eight bits


def hold_out(batches: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Divide calibration images, so that layers are chosen on other images than those that ranges were fitted to.

    Args:
        batches: Pixels (B, C, H, W).

    Returns:
        Batches to measure ranges on, and the last quarter of the images, at most 64. Fewer than four are in both.
    """
    count = sum(map(len, batches))
    held_out = min(_HELD_OUT, count // 4)
    if held_out == 0:
        return list(batches), list(batches)
    return _slice(batches, 0, count - held_out), _slice(batches, count - held_out, count)


def quantize_bounded(
    write: Callable[[Nodes], Run],
    dense: Run,
    held_out: Sequence[np.ndarray],
    *,
    weights: Mapping[str, int],
    between: Mapping[str, Sequence[str]],
    harm: Harm = DIVERGENCE,
    always_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Quantise all but the layers whose quantisation changes the predictions most.

    Layers with weights are left out in at most `_MAX_UNITS` groups of consecutive ones, those between them by type, as
    few as needed for `MAX_DIVERGENCE`, or without classes for `MAX_DISTANCE`.

    Args:
        write: Writes the model with all nodes but the given ones in eight bits, and opens it; called last with the
            nodes that were chosen.
        dense: The model in fp32.
        held_out: Pixels (B, C, H, W) of images that no range was fitted to.
        weights: Number of weights of each layer that has some, in the order of the network.
        between: Type -> names of the nodes between these layers that are quantised too.
        harm: What is bounded.
        always_out: Layers with weights that stay in fp32 in any case.

    Returns:
        How the model was quantised, for `export.json`.

    Raises:
        ExportError: The bound leaves less than half of the weights in eight bits.
    """
    reference, bound = _run(dense, held_out), MAX_DIVERGENCE if harm is DIVERGENCE else MAX_DISTANCE

    def effect(left_out: Nodes) -> float:
        return harm.measure(reference, _run(write(left_out.union(always_out)), held_out))

    units = _list_units([name for name in weights if name not in always_out], between)
    choice = choose_left_out(units, effect, bound)
    nodes = choice.nodes.union(always_out)
    share = 1 - sum(weights.get(node, 0) for node in nodes) / max(sum(weights.values()), 1)
    if share < _MIN_SHARE:
        raise ExportError(
            f"--precision int8 would store {share:.0%} of the weights in eight bits: with more, the "
            f"{harm.text.format(f'more than {bound}')}; use --precision fp16"
        )
    write(nodes)
    return {
        "held_out_images": len(reference),
        harm.key: choice.divergence,
        "always_out": list(always_out),
        "left_out": [*always_out, *(unit.name for unit in choice.left_out)],
        "share_of_weights": share,
    }


def _slice(batches: Sequence[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
    """Return the images from `start` to `stop`, in the batches that they are in."""
    found, first = [], 0
    for batch in batches:
        part = batch[max(start - first, 0) : max(stop - first, 0)]
        first += len(batch)
        if len(part):
            found.append(part)
    return found


def _run(run: Run, batches: Sequence[np.ndarray]) -> np.ndarray:
    """Return the outputs for all batches."""
    return np.concatenate([run(pixels) for pixels in batches])


def _list_units(layers: Sequence[str], between: Mapping[str, Sequence[str]]) -> list[Unit]:
    """Return groups of consecutive layers, and one unit for each type between them."""
    size = -(-len(layers) // _MAX_UNITS)
    parts = [layers[start : start + size] for start in range(0, len(layers), max(size, 1))]
    types = [Unit(f"all {kind}", frozenset(names)) for kind, names in sorted(between.items())]
    return [*map(_unit, parts), *types]


def _unit(names: Sequence[str]) -> Unit:
    return Unit(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", frozenset(names))
