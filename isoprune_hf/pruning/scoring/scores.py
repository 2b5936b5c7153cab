"""`score_groups` and its result, `ImportanceScores`: one score for each channel and each residual block.

The scores come with a record of how they were computed, and are saved together with it as safetensors.
"""

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from isoprune_hf.pruning.calibration.calibration import Batches, Calibration
from isoprune_hf.pruning.calibration.gradients import check_finite
from isoprune_hf.pruning.calibration.resumable import ResumableBatches
from isoprune_hf.pruning.graph.layers import BatchNorm
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.scoring.criteria.criterion import Reduction, ScoringTask
from isoprune_hf.pruning.scoring.criteria.registry import CRITERIA
from isoprune_hf.pruning.scoring.rank_correlation import correlate_precisions
from isoprune_hf.recipes import Criterion
from isoprune_hf.recipes.values import Precision
from isoprune_hf.version import __version__

logger = logging.getLogger(__name__)

Sample = Mapping[str, str | int | Sequence[int]]
# Prefixes of tensors that are no group: no name of a module starts with a dot.
_BLOCK = ".block."
_IDS = ".sample."
# Entries of the record in the file, with their types.
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
    """One float32 score for each channel of each group; the channels with low scores are removed.

    Args:
        scores: Group name -> scores of shape (channels,); groups that the criterion cannot score are missing.
        criterion: Name of the criterion.
        fingerprint: Fingerprint of the weights that were scored.
        sample: Description of the calibration images: their number, a hash of their ids, the ids; empty without data.
        blocks: Residual block -> its score.
        reduction: How the members of a channel were combined: sum or mean.
        score_batchnorm: The parameters of BatchNorm were scored, too.
        precision: Precision of the passes over images.
        correlation: For bf16: rank correlation with the scores in fp32 (see `score_groups`).
        rotated: The heads were rotated before (`rotate_heads`); `fingerprint` is that of the weights before.
        versions: Library -> version that computed the scores.
    """

    scores: Mapping[str, torch.Tensor]
    criterion: Criterion
    fingerprint: str
    sample: Sample
    blocks: Mapping[str, float] = field(default_factory=dict)
    reduction: Reduction = "sum"
    score_batchnorm: bool = True
    precision: Precision = "no"
    correlation: float | None = None
    rotated: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write scores and sample ids as safetensors, with the record in the metadata."""
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
        """Load scores that `save` wrote.

        Raises:
            RecipeError: The file does not exist, contains no scores, or is damaged.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                record = json.loads((file.metadata() or {})["isoprune"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise RecipeError(
                f"{path} is not a file of importance scores; create one with `isoprune score`"
            ) from error
        fault = _find_fault(record, tensors)
        if fault:
            raise RecipeError(
                f"{path} contains damaged importance scores ({fault}); create it again with `isoprune score`"
            )
        ids = {name.removeprefix(_IDS): value.tolist() for name, value in tensors.items() if name.startswith(_IDS)}
        blocks = {
            name.removeprefix(_BLOCK): value.item() for name, value in tensors.items() if name.startswith(_BLOCK)
        }
        scores = {name: value for name, value in tensors.items() if not name.startswith((_BLOCK, _IDS))}
        return cls(scores=scores, blocks=blocks, **{**record, "sample": {**record["sample"], **ids}})


def _find_fault(record: Any, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return a description of the first fault in the contents of a file of scores; None if there is none."""
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
        return "sample contains values other than strings and integers"
    if not all(isinstance(value, str) for value in record["versions"].values()):
        return "versions contains values other than strings"
    for name, value in tensors.items():
        dtype = torch.float64 if name.startswith(_BLOCK) else torch.int64 if name.startswith(_IDS) else torch.float32
        dims = 0 if name.startswith(_BLOCK) else 1
        if value.dtype != dtype or value.ndim != dims or not value.numel():
            return f"{name[:80]!r} has the type {value.dtype} and the shape {list(value.shape)}"
        if not torch.isfinite(value).all() or (value < 0).any():
            return f"{name[:80]!r} contains values that are negative, nan or inf"
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

    Raises:
        RecipeError: There is no image for a criterion that reads images, values are not finite, or all groups or a
            block have nothing that the criterion scores.
    """
    method = CRITERIA[criterion]
    first = None
    if method.reads_images:
        if batches is None:
            raise RecipeError(f"criterion {criterion} needs data: set --data.dataset, or use --prune.criterion l1")
        if isinstance(batches, ResumableBatches):
            batches = batches.with_key(weights=fingerprint(model.model), criterion=criterion, precision=precision)
        if precision == "bf16":
            first = list(itertools.islice(iter(batches), 1))
            if isinstance(batches, Iterator):
                batches = itertools.chain(first, batches)
    weights, batchnorm = _scored_weights(model.model, groups, blocks, score_batchnorm=score_batchnorm)
    task = ScoringTask(
        criterion=criterion,
        model=model,
        groups=groups,
        blocks=blocks,
        weights=weights,
        batchnorm=batchnorm,
        calibration=Calibration(() if batches is None else batches, accelerator, precision),
        seed=seed,
        reduction=reduction,
        score_batchnorm=score_batchnorm,
    )
    raw = method.score(task)
    scores = {name: score.to(torch.float32).cpu().contiguous() for name, score in raw.groups.items()}
    check_finite(scores, "scores")
    unscored = [group.name for group in groups if group.name not in scores]
    if unscored:
        logger.info("criterion %s scores nothing in %d groups: %s", criterion, len(unscored), ", ".join(unscored))
    return ImportanceScores(
        scores,
        criterion,
        fingerprint(model.model),
        dict(sample or {}),
        blocks=raw.blocks,
        reduction=reduction,
        score_batchnorm=score_batchnorm,
        precision=precision if method.reads_images else "no",
        correlation=None if first is None else correlate_precisions(method, task, first),
        versions={name: version(name) for name in ("torch", "torch-pruning", "timm", "transformers")}
        | {"isoprune-hf": __version__},
    )


def _scored_weights(
    base: nn.Module,
    groups: Sequence[CoupledGroup],
    blocks: Sequence[ResidualBlock],
    *,
    score_batchnorm: bool,
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """Collect the parameters of groups and blocks in float32, and the names of those that belong to BatchNorm.

    Raises:
        RecipeError: A parameter is not finite.
    """
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
