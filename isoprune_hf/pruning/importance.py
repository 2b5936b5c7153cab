"""How important every channel is: gradients over all ranks, then one score for each channel."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.groups import CoupledGroup

Criterion = Literal["taylor", "l1", "l2", "random"]


@dataclass(frozen=True, eq=False)
class ImportanceScores:
    """One float32 score for each channel of each group; only the channels with low scores leave.

    Args:
        scores: Group name -> scores of shape (channels,).
        criterion: What was measured.
        fingerprint: Fingerprint of the weights that were scored.
        sample: What was seen: the number of images and a hash of their ids; empty without data.
    """

    scores: Mapping[str, torch.Tensor]
    criterion: str
    fingerprint: str
    sample: Mapping[str, str | int]
    blocks: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the scores as safetensors; the record goes into its metadata."""
        record = {"criterion": self.criterion, "fingerprint": self.fingerprint, "sample": dict(self.sample)}
        save_file(dict(self.scores), str(path), metadata={"isoprune": json.dumps(record, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> "ImportanceScores":
        """Read scores that `save` wrote.

        Raises:
            RecipeError: The file is not there or holds no scores.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                record = json.loads((file.metadata() or {})["isoprune"])
                scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls(scores, record["criterion"], record["fingerprint"], record["sample"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RecipeError(f"{path} is no file of importance scores; write one with `isoprune score`") from error


def fingerprint(model: nn.Module) -> str:
    """Hash names, shapes and bytes of all weights: equal models have equal fingerprints."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def score_groups(
    model: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    *,
    criterion: Criterion = "taylor",
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]] | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    sample: Mapping[str, str | int] | None = None,
) -> ImportanceScores:
    """Score every channel of every group.

    Args:
        model: The base; its mode, gradients and `requires_grad` are left as they are.
        groups: Groups of `trace_groups`.
        criterion: taylor: sum of |w dL/dw| over the elements of the channel; l1: sum of |w|; l2: root of the sum of
            w^2; random: uniform numbers from `seed`.
        batches: For taylor: this rank's micro-batches, (images (B, C, H, W), labels (B,)). Every rank has its own
            share; the result is the same for any number of ranks, and none waits for another before the end.
        accelerator: Ranks that share the work; default is this process alone.
        seed: Seed of the random criterion.
        sample: Record of what the batches hold, kept beside the scores.

    Raises:
        RecipeError: taylor without batches, or without a single image.

    Source:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, first-order Taylor; the sum over
        coupled parameters is Fang et al., Isomorphic Pruning, ECCV 2024 (arXiv 2407.04616).
    """
    named = dict(model.model.named_parameters())
    members = {member.parameter for group in groups for member in group.members}
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.channels, generator=generator) for group in groups}
    else:
        weights = {name: named[name].detach().float() for name in sorted(members & named.keys())}
        if criterion == "taylor":
            gradients = _mean_gradients(model, weights.keys(), batches, accelerator)
            values = {name: (weight * gradients.pop(name)).abs() for name, weight in weights.items()}
        else:
            values = {name: weight.abs() if criterion == "l1" else weight.square() for name, weight in weights.items()}
        scores = {group.name: _reduce(group, values) for group in groups}
        if criterion == "l2":
            scores = {name: score.sqrt() for name, score in scores.items()}
    scores = {name: score.to(torch.float32).cpu().contiguous() for name, score in scores.items()}
    return ImportanceScores(scores, criterion, fingerprint(model.model), dict(sample or {}))


def _reduce(group: CoupledGroup, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum the values of all elements of each channel: (channels,)."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        if member.parameter in values:
            value = values[member.parameter]
            others = [dim for dim in range(value.ndim) if dim != member.dim]
            along = value.double().sum(others) if others else value.double()
            total += along.cpu()[torch.from_numpy(np.ascontiguousarray(member.index))].sum(1)
    return total


def _mean_gradients(
    model: IsoPruneForImageClassification,
    names: Iterable[str],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]] | None,
    accelerator: Accelerator | None,
) -> dict[str, torch.Tensor]:
    """Mean gradient of the cross-entropy over all images of all ranks, float32.

    Sums are taken in float64, of the loss summed over a micro-batch, and added over ranks once at the end: the float32
    result does not depend on how many ranks shared the batches. Absolute values come after that, never before.
    """
    if batches is None:
        raise RecipeError("criterion taylor needs data: give --data.dataset, or take --prune.criterion l1")
    parameters = {name: model.model.get_parameter(name) for name in names}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    device = model.device
    sums = {name: torch.zeros(p.shape, dtype=torch.float64, device=device) for name, p in parameters.items()}
    images = torch.zeros((), dtype=torch.int64, device=device)
    model.eval()
    for parameter in flags:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            for pixel_values, labels in batches:
                logits = model(pixel_values=pixel_values.to(device)).logits
                loss = nn.functional.cross_entropy(logits, labels.to(device), reduction="sum")
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total += gradient
                images += len(labels)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
    if accelerator is not None and accelerator.num_processes > 1:
        images = accelerator.reduce(images, "sum")
        sums = accelerator.reduce(sums, "sum")
    if not images:
        raise RecipeError("criterion taylor needs at least one image; the training split is empty")
    return {name: (total / images).float() for name, total in sums.items()}
