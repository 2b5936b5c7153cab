"""Compare the outputs of a network with those of the dense one, image by image: call `compare_outputs`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BaseImageProcessor

from isoprune_hf.data.decoding import Rows, check_broken
from isoprune_hf.data.loading import ALONE, LoaderOptions, Ranks, eval_loader
from isoprune_hf.data.pixels import normalised
from isoprune_hf.errors import DatasetError
from isoprune_hf.evaluation.evaluate import eval_mode
from isoprune_hf.evaluation.predictions import Figures
from isoprune_hf.models.held import HeldModel
from isoprune_hf.terminal import with_progress

# From the outputs of a network and those of the dense one to a figure of each image, (B,).
Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def compare_outputs(
    model: HeldModel,
    dense: nn.Module | None,
    split: Rows,
    processor: BaseImageProcessor,
    options: LoaderOptions,
    measures: Mapping[str, Measure],
    *,
    accelerator: Accelerator | None = None,
    visit: Callable[[list[int], Sequence[Tensor]], None] | None = None,
) -> Figures:
    """Compute the means, over the images of a split, of figures of the outputs of a network and the dense ones.

    Args:
        model: The network, on its current device.
        dense: The dense network, on the same device; None if the model is the dense one, or it is not known.
        split: Images with the columns `image` and `label`, which is not looked at.
        processor: Makes the pixel values.
        options: How the images are loaded.
        measures: The figures by name; without `dense` left out.
        accelerator: The ranks that share the work. All must call this with the same split.
        visit: Called with the positions of the images of this rank that could be read, and their outputs.

    Returns:
        The figures, `images`, and `broken` if images could not be read.

    Raises:
        DatasetError: An image cannot be read, or more images than the policy allows.
    """
    ranks = ALONE if accelerator is None else Ranks(accelerator.process_index, accelerator.num_processes)
    found = torch.zeros(len(measures) + 1, len(split), dtype=torch.float64)  # the last row marks broken images
    loader = eval_loader(split, processor, options, ranks)
    with torch.no_grad(), ExitStack() as modes:
        for network in (model,) if dense is None else (model, dense):
            modes.enter_context(eval_mode(network))
        for positions, pixels, _, is_replacement in with_progress(loader, "evaluate", "batch", rank=ranks.rank):
            found[-1, positions] = is_replacement.double()
            if dense is None and visit is None:
                continue
            pixel_values = normalised(pixels.to(model.device, non_blocking=True), processor)
            outputs = model(pixel_values=pixel_values).outputs
            if dense is not None:
                wanted = dense(pixel_values=pixel_values).outputs
                for row, measure in zip(found, measures.values(), strict=False):
                    row[positions] = measure(outputs, wanted).double().cpu()
            if visit is not None:
                is_read = ~is_replacement
                visit(positions[is_read].tolist(), [part[is_read.to(part.device)] for part in outputs])
    if accelerator is not None and ranks.world > 1:
        # Each place was written by one rank, so the sum is a union.
        found = accelerator.reduce(found.to(accelerator.device), reduction="sum").cpu()
    return dict(_means(found, measures if dense is not None else {}, options))


def _means(found: Tensor, names: Mapping[str, Measure], options: LoaderOptions) -> Iterator[tuple[str, float | int]]:
    """Yield the figures of all images, (figures + 1, N), of which the last row marks broken ones."""
    broken = found[-1] > 0
    check_broken(int(broken.sum()), options.decoding, "the evaluation")
    read = ~broken if options.decoding.broken == "skip" else torch.ones_like(broken)
    if not read.any():
        raise DatasetError("data: the evaluation split has no readable image; fix its files, or set data.eval_split")
    yield "images", int(read.sum())
    for name, row in zip(names, found, strict=False):
        yield name, float(row[read].mean())
    if broken.any():
        yield "broken", int(broken.sum())
