"""`ImportanceScores`: one score for each channel and each residual block.

The scores come with a record of how they were computed, and are saved together with it as safetensors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from isoprune_hf.errors import RecipeError
from isoprune_hf.plain_files import require_file
from isoprune_hf.pruning.scoring.criteria.criterion import Reduction
from isoprune_hf.pruning.scoring.criteria.registry import CRITERIA
from isoprune_hf.recipes import Criterion
from isoprune_hf.recipes.values import Precision

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
    "unscored": dict,
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
        unscored: Group or block without a score -> what it lacks, such as `BatchNorm`.
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
    unscored: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write scores and sample ids as safetensors, with the record in the metadata."""
        ids = {key: value for key, value in self.sample.items() if not isinstance(value, (str, int))}
        tensors = dict(self.scores)
        tensors |= {_BLOCK + name: torch.tensor(score, dtype=torch.float64) for name, score in self.blocks.items()}
        tensors |= {_IDS + key: torch.tensor(value, dtype=torch.int64) for key, value in ids.items()}
        record = {name: getattr(self, name) for name in _RECORD}
        record["sample"] = {key: value for key, value in self.sample.items() if key not in ids}
        record["versions"] = dict(self.versions)
        record["unscored"] = dict(self.unscored)
        save_file(tensors, str(path), metadata={"isoprune": json.dumps(record, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> "ImportanceScores":
        """Load scores that `save` wrote.

        Raises:
            RecipeError: The file does not exist, contains no scores, or is damaged.
        """
        try:
            require_file(path)
            with safe_open(str(path), framework="pt") as file:
                record = json.loads((file.metadata() or {})["isoprune"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise RecipeError(
                f"{path} is not a file of importance scores; create one with `isoprune score`"
            ) from error
        if isinstance(record, dict):
            record.setdefault("unscored", {})  # files of earlier versions do not have it
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
    for name in ("versions", "unscored"):
        if not all(isinstance(value, str) for value in record[name].values()):
            return f"{name} contains values other than strings"
    for name, value in tensors.items():
        dtype = torch.float64 if name.startswith(_BLOCK) else torch.int64 if name.startswith(_IDS) else torch.float32
        dims = 0 if name.startswith(_BLOCK) else 1
        if value.dtype != dtype or value.ndim != dims or not value.numel():
            return f"{name[:80]!r} has the type {value.dtype} and the shape {list(value.shape)}"
        if not torch.isfinite(value).all() or (value < 0).any():
            return f"{name[:80]!r} contains values that are negative, nan or inf"
    return None
