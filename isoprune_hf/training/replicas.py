"""Parts of a batch: what BatchNorm, mixup and dropout see, whatever the number of ranks that share the batch."""

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.recipes import FinetuneRecipe

logger = get_logger(__name__)


def count_parts(recipe: FinetuneRecipe, *, world: int) -> int:
    """Return the parts of a batch over all ranks.

    Raises:
        RecipeError: The ranks cannot share them equally.
    """
    parts = recipe.virtual_replicas
    if parts is None:
        return world * recipe.grad_accumulation
    if parts % world:
        legal = [str(ranks) for ranks in range(1, parts + 1) if parts % ranks == 0]
        raise RecipeError(
            f"finetune.virtual_replicas is {parts}, which {' or '.join(legal)} ranks can share, got {world}"
        )
    return parts


def fit_batch_size(images: int, recipe: FinetuneRecipe, *, world: int) -> int:
    """Return the images of an update: the recipe's number, or the largest legal one that a small split has.

    Raises:
        RecipeError: The number is no multiple of the parts of a batch.
        DatasetError: The split is smaller than one image for each of them.
    """
    parts = count_parts(recipe, world=world)
    multiple, what = parts, f"virtual_replicas = {parts}"
    if recipe.virtual_replicas is None:
        what = f"ranks x grad_accumulation = {world} x {recipe.grad_accumulation}"
    if (recipe.mixup or recipe.cutmix) and recipe.mixup_pairing == "flip":
        multiple, what = 2 * parts, f"2 x {what} (mixup_pairing flip pairs images)"
    if recipe.batch_size % multiple:
        below = recipe.batch_size // multiple * multiple
        legal = " or ".join(str(size) for size in (below, below + multiple) if size)
        raise RecipeError(f"finetune.batch_size must be a multiple of {what}, got {recipe.batch_size}; give {legal}")
    if images >= recipe.batch_size:
        return recipe.batch_size
    if images < multiple:
        advice = "grad_accumulation or start fewer ranks" if recipe.virtual_replicas is None else "virtual_replicas"
        raise DatasetError(f"finetune: {images} training images are fewer than {what}; lower finetune.{advice}")
    fitted = images // multiple * multiple
    logger.warning(
        f"finetune.batch_size {recipe.batch_size} is more than the {images} training images, using {fitted}"
    )
    return fitted


class AveragedStatistics:
    """Running statistics of BatchNorm as the mean over the parts of a batch, the same on all ranks.

    Each part starts from the statistics before the update; the mean of what the parts make of them stays.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        means = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self._means = [buffer for buffer in means if buffer is not None]
        self._counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._accelerator = accelerator

    def begin(self) -> None:
        """Start an update."""
        self._start = [buffer.clone() for buffer in self._means]
        self._counts = [counter.clone() for counter in self._counters]
        self._sums = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in self._means]
        self._parts = 0

    def add(self, *, counts: bool) -> None:
        """Take in, after its forward pass, what a part has made of the statistics, unless its samples do not count."""
        if counts:
            for buffer, total in zip(self._means, self._sums, strict=True):
                total += buffer
        self._parts += counts

    def end(self) -> None:
        """Put the mean over all parts and ranks in place; all ranks call this."""
        if not self._means:
            return
        values: list[Tensor] = [*self._sums, torch.tensor(self._parts, device=self._means[0].device)]
        if self._accelerator.num_processes > 1:
            values = self._accelerator.reduce(values, "sum")
        for buffer, total in zip(self._means, values, strict=False):
            buffer.copy_(total / values[-1])
        for counter, start in zip(self._counters, self._counts, strict=True):
            counter.copy_(start + 1)

    def undo(self) -> None:
        """Put back what was there when the update started, after the backward pass of a part: it may need them."""
        for buffer, start in zip(self._means, self._start, strict=True):
            buffer.copy_(start)
        for counter, start in zip(self._counters, self._counts, strict=True):
            counter.copy_(start)
