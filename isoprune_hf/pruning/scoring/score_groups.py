"""Score the channels of coupled groups, and residual blocks, by a criterion: `score_groups`."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version

import torch
from accelerate import Accelerator
from torch import nn

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.held import HeldModel
from isoprune_hf.models.layout import in_fast_layout
from isoprune_hf.pruning.calibration.calibration import Batch, Batches, Calibration
from isoprune_hf.pruning.calibration.gradients import check_finite, scoring_mode
from isoprune_hf.pruning.calibration.resumable import ResumableBatches
from isoprune_hf.pruning.graph.layers import BatchNorm
from isoprune_hf.pruning.graph.precision import in_float32
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.scoring.criteria.criterion import RawScores, Reduction, ScoringTask, Values
from isoprune_hf.pruning.scoring.criteria.registry import CRITERIA
from isoprune_hf.pruning.scoring.rank_correlation import correlate_precisions
from isoprune_hf.pruning.scoring.reduction import refuse_unscored
from isoprune_hf.pruning.scoring.scores import ImportanceScores, Sample
from isoprune_hf.recipes import Criterion
from isoprune_hf.recipes.values import Precision
from isoprune_hf.version import __version__

_LIBRARIES = ("torch", "torch-pruning", "timm", "transformers")


def score_groups(
    model: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    *,
    criterion: Criterion = "taylor",
    batches: Batches | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    sample: Sample | None = None,
    reduction: Reduction = "sum",
    score_batchnorm: bool = True,
    precision: Precision = "no",
    blocks: Sequence[ResidualBlock] = (),
) -> ImportanceScores:
    """Score every channel of every group, and every residual block.

    Args:
        model: The base; its mode, gradients, `requires_grad` and buffers are restored.
        groups: Groups of `trace_groups`.
        criterion: What is computed; the folder `scoring/criteria` has the formulas and shows which criteria read
            images. bn_scale scores groups with BatchNorm only; random draws uniform numbers from `seed`.
        batches: For criteria that read images: this rank's micro-batches, (images (B, C, H, W), labels (B,)). Every
            rank has its own share, number k on rank k % world; the result is the same for any number of ranks, and
            ranks wait for each other only at the end.
        accelerator: Ranks that share the work; default is this process only.
        seed: Seed of the random criterion.
        sample: Description of the batches, recorded with the scores; a list of ids is recorded, too.
        reduction: How the members of a channel (weights, biases, norms) are combined: sum or mean.
        score_batchnorm: Score the weights and biases of BatchNorm, too; torch-pruning omits them from Taylor scores.
        precision: bf16 runs the passes over images under autocast. Then the first micro-batch of rank 0 is scored in
            both precisions, and the mean over groups of the rank correlation is reported and recorded.
        blocks: Residual blocks to score: the mean of the same values over all elements of the block, or over the
            channels inside it (see `reduction.py`).

    Returns:
        The scores. Groups and blocks that the criterion cannot score, or not by finite numbers, have none.

    Raises:
        RecipeError: There is no image for a criterion that reads images, a weight is not finite, or the scores rank
            the channels of no group.
    """
    method = CRITERIA[criterion]
    precision = precision if method.reads_images else "no"
    key = fingerprint(model.model)
    first, images = _open_images(batches if method.reads_images else (), criterion, precision, key)
    calibration = Calibration(images, accelerator, precision)
    wide = in_float32(model) if method.reads_images else model
    weights, batchnorm = _scored_weights(wide.model, groups, blocks, score_batchnorm=score_batchnorm)
    task = ScoringTask(
        criterion, wide, groups, blocks, weights, batchnorm, calibration, seed, reduction, score_batchnorm
    )
    with _fast_passes(wide) if method.reads_images else nullcontext():
        raw = _finite_scores(task, method.score(task))
    return ImportanceScores(
        raw.groups,
        criterion,
        key,
        dict(sample or {}),
        blocks=raw.blocks,
        reduction=reduction,
        score_batchnorm=score_batchnorm,
        precision=precision,
        correlation=correlate_precisions(method, task, first) if precision == "bf16" else None,
        versions={name: version(name) for name in _LIBRARIES} | {"isoprune-hf": __version__},
        unscored=raw.unscored,
    )


@contextmanager
def _fast_passes(model: IsoPruneForImageClassification) -> Iterator[None]:
    """Keep a model in the layout of `in_fast_layout` within the context; one that is tried on a random image."""
    size = model.config.image_size
    with ExitStack() as layout:
        if size is not None and not isinstance(model, HeldModel):
            image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
            with scoring_mode(model, requires_grad=False):
                layout.enter_context(in_fast_layout(model, image))
        yield


def _open_images(
    batches: Batches | None, criterion: Criterion, precision: Precision, weights: str
) -> tuple[list[Batch], Batches]:
    """Return the first micro-batch, if bf16 is to be compared on it, and all micro-batches.

    Raises:
        RecipeError: There are none.
    """
    if batches is None:
        raise RecipeError(f"criterion {criterion} needs data: set --data.dataset, or use --prune.criterion l1")
    if isinstance(batches, ResumableBatches):
        batches = batches.with_key(weights=weights, criterion=criterion, precision=precision)
    if precision == "no":
        return [], batches
    first = list(itertools.islice(iter(batches), 1))
    return first, itertools.chain(first, batches) if isinstance(batches, Iterator) else batches


def _finite_scores(task: ScoringTask, raw: RawScores) -> RawScores:
    """Return the scores in float32, without those of groups and blocks that are not finite.

    Raises:
        UnscoredError: The criterion finds nothing to score in any group.
        RecipeError: No group has finite scores, or the scores of each group are equal, so that nothing is ranked.
    """
    groups = {name: score.to(torch.float32).cpu().contiguous() for name, score in raw.groups.items()}
    finite = {name: score for name, score in groups.items() if score.isfinite().all()}
    blocks = {name: score for name, score in raw.blocks.items() if math.isfinite(score)}
    if not finite:
        check_finite(groups, "scores")
        for group in task.groups:
            refuse_unscored(task, group.name, raw.unscored[group.name])
    if finite and all(score.min() == score.max() for score in finite.values()):
        name, score = next(iter(finite.items()))
        raise RecipeError(
            f"the scores of criterion {task.criterion} rank no channel: all channels of {name} have the score "
            f"{score[0].item():g}, and those of every other group have equal scores, too; check the weights of the "
            "base, or use another --prune.criterion"
        )
    names = [name for name in (*groups, *raw.blocks) if name not in finite and name not in blocks]
    return RawScores(finite, blocks, raw.unscored | dict.fromkeys(names, "finite scores"))


class _InFloat32(Mapping[str, torch.Tensor]):
    """Weights by name, each converted when it is read: all of them in float32 never exist at once."""

    def __init__(self, stored: Mapping[str, torch.Tensor]):
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _scored_weights(
    base: nn.Module,
    groups: Sequence[CoupledGroup],
    blocks: Sequence[ResidualBlock],
    *,
    score_batchnorm: bool,
) -> tuple[Values, frozenset[str]]:
    """Collect the parameters of groups and blocks in float32, and the names of those that belong to BatchNorm.

    Raises:
        RecipeError: A parameter is not finite.
    """
    norms = {name for name, module in base.named_modules() if isinstance(module, BatchNorm)}
    wanted = {member.parameter for group in groups for member in group.members}
    wanted |= {name for block in blocks for name in block.parameters}
    named = {name: parameter for name, parameter in base.named_parameters() if name in wanted}
    batchnorm = frozenset(name for name in named if name.rpartition(".")[0] in norms)
    weights = _InFloat32(
        {name: named[name].detach() for name in sorted(named) if score_batchnorm or name not in batchnorm}
    )
    check_finite(weights, "weights")
    return weights, batchnorm & weights.keys()
