"""Time the layers of models in a runtime: call `time_in_runtime`."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.folding import fold_batchnorm
from isoprune_hf.measuring.images import draw_images
from isoprune_hf.measuring.onnx_profile import LayerTimes, time_onnx_layers
from isoprune_hf.measuring.runtimes.engine import Runtime
from isoprune_hf.measuring.speed import measure_latency
from isoprune_hf.pruning.cost.layer_times import Variant, time_layers


def time_in_runtime(
    variants: Sequence[Variant], image_size: Sequence[int], *, batch_size: int, runtime: Runtime, repeats: int
) -> list[LayerTimes]:
    """Measure each variant: the milliseconds of a pass, and of each layer in it.

    ONNX Runtime reports the time of each of its kernels and of the pass. In eager mode and in channels_last the layers
    are timed by hooks. Compiled layers and those of OpenVINO cannot be timed one by one: their shares are those of
    eager mode and of channels_last.

    Args:
        variants: Models with their MACs by layer; they are not changed.
        image_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        runtime: Where they run.
        repeats: Timed passes.

    Raises:
        RecipeError: A number is too small.
    """
    if runtime.name == "onnxruntime":
        threads = runtime.threads or torch.get_num_threads()
        return [
            time_onnx_layers(
                model,
                image_size,
                [name for name, macs in layer_macs.items() if macs > 0],
                batch_size=batch_size,
                threads=threads,
                repeats=repeats,
            )
            for model, layer_macs in variants
        ]
    totals = measure_latency(
        {str(number): model for number, (model, _) in enumerate(variants)},
        image_size,
        batch_size=batch_size,
        runtime=runtime,
        repeats=repeats,
    )
    if runtime.name in ("channels_last", "openvino"):
        variants = [(_in_channels_last(model, image_size), layer_macs) for model, layer_macs in variants]
    layers = time_layers(variants, image_size, batch_size=batch_size, dtype=runtime.dtype, repeats=repeats)
    return [LayerTimes(times, total) for times, total in zip(layers, totals.values(), strict=True)]


def _in_channels_last(
    model: IsoPruneForImageClassification, image_size: Sequence[int]
) -> IsoPruneForImageClassification:
    """Return a copy with folded BatchNorm whose weights are NHWC, which its first convolution makes of the images."""
    folded, _ = fold_batchnorm(model, draw_images(model, image_size, 2))
    nn.Module.to(folded, memory_format=torch.channels_last)  # transformers wraps its own `to` without types
    return cast("IsoPruneForImageClassification", folded)
