"""Parts of a batch (virtual replicas): the unit of BatchNorm, mixup and dropout, for any number of ranks.

`count_parts` and `fit_batch_size` divide a batch; `AveragedStatistics` averages BatchNorm over its parts.
"""

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.pruning.graph.layers import BatchNorm
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.acceleration import float64_device

logger = get_logger(__name__)


def count_parts(recipe: FinetuneRecipe, *, world: int) -> int:
    """Return the number of parts of a batch over all ranks.

    Raises:
        RecipeError: The parts cannot be divided equally among the ranks.
    """
    parts = recipe.virtual_replicas
    if parts is None:
        return world * recipe.grad_accumulation
    if parts % world:
        legal = [str(ranks) for ranks in range(1, parts + 1) if parts % ranks == 0]
        raise RecipeError(
            f"finetune.virtual_replicas {parts} cannot be divided among {world} ranks; start "
            f"{' or '.join(legal)} ranks"
        )
    return parts


def fit_batch_size(images: int, recipe: FinetuneRecipe, *, world: int) -> int:
    """Return the number of images of an update: the recipe's, or the largest valid one for a smaller split.

    Raises:
        RecipeError: The recipe's batch size is not a multiple of the parts of a batch.
        DatasetError: The split has fewer images than a batch has parts.
    """
    parts = count_parts(recipe, world=world)
    multiple = parts
    formula = f"virtual_replicas = {parts}"
    if recipe.virtual_replicas is None:
        formula = f"ranks x grad_accumulation = {world} x {recipe.grad_accumulation}"
    if (recipe.mixup or recipe.cutmix) and recipe.mixup_pairing == "flip":
        multiple = 2 * parts
        formula = f"2 x {formula} (mixup_pairing flip pairs images)"
    if recipe.batch_size % multiple:
        below = recipe.batch_size // multiple * multiple
        legal = " or ".join(str(size) for size in (below, below + multiple) if size)
        raise RecipeError(
            f"finetune.batch_size must be a multiple of {formula}, got {recipe.batch_size}; set it to {legal}"
        )
    if images >= recipe.batch_size:
        return recipe.batch_size
    if images < multiple:
        advice = "grad_accumulation or start fewer ranks" if recipe.virtual_replicas is None else "virtual_replicas"
        raise DatasetError(f"finetune: {images} training images are fewer than {formula}; lower finetune.{advice}")
    fitted = images // multiple * multiple
    logger.warning(
        f"finetune.batch_size {recipe.batch_size} is more than the {images} training images; using {fitted}"
    )
    return fitted


class AveragedStatistics:
    """Running statistics of BatchNorm as the mean over the parts of a batch, the same on all ranks.

    Every part starts from the statistics before the update; the mean over the parts replaces them. Per update, call
    `begin`, then `add` and `undo` for each part, then `end`.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self._buffers = [buffer for buffer in buffers if buffer is not None]
        self._counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._accelerator = accelerator
        self._sum_device = float64_device(accelerator.device)

    def begin(self) -> None:
        """Start an update: remember the statistics before it."""
        self._old_buffers = [buffer.clone() for buffer in self._buffers]
        self._old_counters = [counter.clone() for counter in self._counters]
        self._sums = [
            torch.zeros(buffer.shape, dtype=torch.float64, device=self._sum_device) for buffer in self._buffers
        ]
        self._parts = 0

    def add(self, *, counts: bool) -> None:
        """Add the statistics that the forward pass of a part left behind, unless its samples do not count."""
        if counts:
            for buffer, total in zip(self._buffers, self._sums, strict=True):
                total += buffer.to(self._sum_device)
        self._parts += counts

    def end(self) -> None:
        """Replace the statistics by the mean over all parts and ranks; all ranks call this."""
        if not self._buffers:
            return
        values: list[Tensor] = [*self._sums, torch.tensor(self._parts, device=self._sum_device)]
        if self._accelerator.num_processes > 1:
            values = self._accelerator.reduce(values, "sum")
        *sums, parts = values
        for buffer, total in zip(self._buffers, sums, strict=True):
            buffer.copy_((total / parts).to(buffer.dtype))
        for counter, old in zip(self._counters, self._old_counters, strict=True):
            counter.copy_(old + 1)

    def undo(self) -> None:
        """Restore the statistics before the update; after the backward pass of a part, which may need the new ones."""
        for buffer, old in zip(self._buffers, self._old_buffers, strict=True):
            buffer.copy_(old)
        for counter, old in zip(self._counters, self._old_counters, strict=True):
            counter.copy_(old)
