"""How important every channel is: one score for each channel and block, with a record of how it was found."""

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.calibration.gradients import Batches, Precision, check_finite, sum_over_ranks
from isoprune_hf.pruning.calibration.resumable import KeptBatches
from isoprune_hf.pruning.graph.layers import BatchNorm
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.scoring.criteria import CRITERIA
from isoprune_hf.pruning.scoring.rank_correlation import correlate_ranks
from isoprune_hf.pruning.scoring.reduction import Reduction, Scoring
from isoprune_hf.recipes import DATA_CRITERIA, Criterion, PruneRecipe
from isoprune_hf.version import __version__

logger = logging.getLogger(__name__)

Sample = Mapping[str, str | int | Sequence[int]]
# The name of a module never starts with a dot, so these cannot be names of groups.
_BLOCK, _IDS = ".block.", ".sample."
_RECORD = {
    "criterion": str,
    "fingerprint": str,
    "sample": dict,
    "reduction": str,
    "score_batchnorm": bool,
    "precision": str,
    "correlation": float | int | None,
    "rotated": bool,
    "versions": dict,
}


@dataclass(frozen=True, eq=False)
class ImportanceScores:
    """One float32 score for each channel of each group; only the channels with low scores leave.

    Args:
        scores: Group name -> scores of shape (channels,).
        criterion: What was measured.
        fingerprint: Fingerprint of the weights that were scored.
        sample: What was seen: the number of images, a hash of their ids, or the ids; empty without data.
        blocks: Residual block -> its score.
        reduction: How the members of a channel were put together.
        score_batchnorm: BatchNorm counted.
        precision: Of the passes over images.
        correlation: For bf16: how well it ranks as fp32 does (see `score_groups`).
        rotated: The heads were turned before (`rotate_heads`); `fingerprint` is of the weights before that.
        versions: Library -> version that scored.
    """

    scores: Mapping[str, torch.Tensor]
    criterion: str
    fingerprint: str
    sample: Sample
    blocks: Mapping[str, float] = field(default_factory=dict)
    reduction: str = "sum"
    score_batchnorm: bool = True
    precision: str = "no"
    correlation: float | None = None
    rotated: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write scores and sample ids as safetensors; the record goes into its metadata."""
        ids = {key: value for key, value in self.sample.items() if not isinstance(value, (str, int))}
        tensors = dict(self.scores)
        tensors |= {_BLOCK + name: torch.tensor(score, dtype=torch.float64) for name, score in self.blocks.items()}
        tensors |= {_IDS + key: torch.tensor(value, dtype=torch.int64) for key, value in ids.items()}
        record = {name: getattr(self, name) for name in _RECORD}
        record["sample"] = {key: value for key, value in self.sample.items() if key not in ids}
        record["versions"] = dict(self.versions)
        save_file(tensors, str(path), metadata={"isoprune": json.dumps(record, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> "ImportanceScores":
        """Read scores that `save` wrote.

        Raises:
            RecipeError: The file is not there, holds no scores, or is damaged.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                record = json.loads((file.metadata() or {})["isoprune"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise RecipeError(f"{path} is no file of importance scores; write one with `isoprune score`") from error
        fault = _find_fault(record, tensors)
        if fault:
            raise RecipeError(
                f"{path} holds damaged importance scores ({fault}); write them anew with `isoprune score`"
            )
        ids = {name.removeprefix(_IDS): value.tolist() for name, value in tensors.items() if name.startswith(_IDS)}
        blocks = {
            name.removeprefix(_BLOCK): value.item() for name, value in tensors.items() if name.startswith(_BLOCK)
        }
        scores = {name: value for name, value in tensors.items() if not name.startswith((_BLOCK, _IDS))}
        return cls(scores=scores, blocks=blocks, **{**record, "sample": {**record["sample"], **ids}})


def _find_fault(record: Any, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Say what is wrong with a file of scores."""
    if not isinstance(record, dict) or record.keys() != _RECORD.keys():
        return "its record has other entries than those of a scoring"
    for name, kind in _RECORD.items():
        if not isinstance(record[name], kind) or (isinstance(record[name], bool) and kind is not bool):
            return f"{name} is {str(record[name])[:40]!r}"
    if record["criterion"] not in CRITERIA:
        return f"criterion is {record['criterion'][:40]!r}"
    if record["correlation"] is not None and not -1 <= record["correlation"] <= 1:
        return f"correlation is {record['correlation']}"
    if not all(isinstance(value, (str, int)) for value in record["sample"].values()):
        return "sample holds other values than words and whole numbers"
    if not all(isinstance(value, str) for value in record["versions"].values()):
        return "versions holds other values than words"
    for name, value in tensors.items():
        kind, dims = torch.float32, 1
        if name.startswith((_BLOCK, _IDS)):
            kind, dims = (torch.float64, 0) if name.startswith(_BLOCK) else (torch.int64, 1)
        if value.dtype != kind or value.ndim != dims or not value.numel():
            return f"{name[:80]!r} has the type {value.dtype} and the shape {list(value.shape)}"
        if not torch.isfinite(value).all() or (value < 0).any():
            return f"{name[:80]!r} holds values that are negative, nan or inf"
    return None


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
        model: The base; its mode, gradients, `requires_grad` and buffers are left as they are.
        groups: Groups of `trace_groups`.
        criterion: What a channel is worth; `criteria.py` has the formulas, and the recipe says which of them read
            images. bn_scale needs BatchNorm in every group; random draws uniform numbers from `seed`.
        batches: For criteria from images: this rank's micro-batches, (images (B, C, H, W), labels (B,)). Every rank
            has its own share, number k on rank k % world; the result is the same for any number of ranks, and none
            waits for another before the end.
        accelerator: Ranks that share the work; default is this process alone.
        seed: Seed of the random criterion.
        sample: Record of what the batches hold, kept beside the scores; a list of ids is kept, too.
        reduction: How the members of a channel (weights, biases, norms) are put together: sum or mean.
        score_batchnorm: Let the weights and biases of BatchNorm count; torch-pruning leaves them out of Taylor scores.
        precision: bf16 runs the passes over images under autocast. Then the first micro-batch of rank 0 is scored in
            both precisions, and the mean over groups of the rank correlation is reported and kept.
        blocks: Residual blocks to score: the mean of the same values over all elements of the block, or over the
            channels inside it (see `channel_scores.py`).

    Raises:
        RecipeError: There is no image for a criterion that needs some, values are not finite, or a group or block
            holds nothing that the criterion looks at.
    """
    if criterion == "bn_scale" and not score_batchnorm:
        raise RecipeError("criterion bn_scale scores BatchNorm alone: set --prune.score_batchnorm true")
    first = None
    if criterion in DATA_CRITERIA:
        if batches is None:
            raise RecipeError(f"criterion {criterion} needs data: give --data.dataset, or take --prune.criterion l1")
        if isinstance(batches, KeptBatches):
            batches = batches.of(weights=fingerprint(model.model), criterion=criterion, precision=precision)
        if precision == "bf16":
            first = list(itertools.islice(iter(batches), 1))
            if isinstance(batches, Iterator):
                batches = itertools.chain(first, batches)
    weights, batchnorm = _find_weights(model.model, groups, blocks, score_batchnorm)
    scoring = Scoring(
        criterion=criterion,
        model=model,
        groups=groups,
        blocks=blocks,
        weights=weights,
        batchnorm=batchnorm,
        batches=() if batches is None else batches,
        accelerator=accelerator,
        seed=seed,
        reduction=reduction,
        precision=precision,
    )
    scores, block_scores = CRITERIA[criterion](scoring)
    scores = {name: score.to(torch.float32).cpu().contiguous() for name, score in scores.items()}
    check_finite(scores, "scores")
    return ImportanceScores(
        scores,
        criterion,
        fingerprint(model.model),
        dict(sample or {}),
        blocks=block_scores,
        reduction=reduction,
        score_batchnorm=score_batchnorm,
        precision=precision if criterion in DATA_CRITERIA else "no",
        correlation=None if first is None else _correlate_precisions(scoring, first),
        versions={name: version(name) for name in ("torch", "torch-pruning", "timm", "transformers")}
        | {"isoprune-hf": __version__},
    )


def scoring_options(recipe: PruneRecipe) -> dict[str, Any]:
    """Pick what `score_groups` takes from a recipe, under the names that it has there."""
    return {
        "criterion": recipe.criterion,
        "seed": recipe.seed,
        "reduction": recipe.reduction,
        "score_batchnorm": recipe.score_batchnorm,
        "precision": recipe.scoring_precision,
    }


def _find_weights(
    base: nn.Module, groups: Sequence[CoupledGroup], blocks: Sequence[ResidualBlock], score_batchnorm: bool
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """Collect the parameters that count, in float32, and say which of them are of BatchNorm."""
    norms = {name for name, module in base.named_modules() if isinstance(module, BatchNorm)}
    wanted = {member.parameter for group in groups for member in group.members}
    wanted |= {name for block in blocks for name in block.parameters}
    named = {name: parameter for name, parameter in base.named_parameters() if name in wanted}
    batchnorm = frozenset(name for name in named if name.rpartition(".")[0] in norms)
    weights = {
        name: parameter.detach().float()
        for name, parameter in sorted(named.items())
        if score_batchnorm or name not in batchnorm
    }
    check_finite(weights, "weights")
    return weights, batchnorm & weights.keys()


def _correlate_precisions(scoring: Scoring, first: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float | None:
    """Compare the ranks that bf16 and fp32 give the channels on the first micro-batch of rank 0; equal on all ranks.

    Returns:
        Mean over groups of Spearman's rank correlation; None where no group has two different scores.
    """
    total = torch.zeros(2, dtype=torch.float64, device=scoring.model.device)
    if scoring.accelerator is None or scoring.accelerator.process_index == 0:
        half, full = (
            CRITERIA[scoring.criterion](
                replace(scoring, batches=first, accelerator=None, blocks=(), precision=precision)
            )[0]
            for precision in ("bf16", "no")
        )
        found = [correlate_ranks(half[name].cpu().numpy(), full[name].cpu().numpy()) for name in half]
        found = [value for value in found if not math.isnan(value)]
        total += torch.tensor([sum(found), len(found)], dtype=torch.float64)
    value, count = sum_over_ranks(total, scoring.accelerator).tolist()
    if scoring.accelerator is None or scoring.accelerator.is_main_process:
        logger.info(
            "bf16 ranks the channels as fp32 does with a mean rank correlation of %.4f over %d groups (%d images)",
            value / max(count, 1),
            count,
            sum(len(labels) for _, labels in first),
        )
    return value / count if count else None
