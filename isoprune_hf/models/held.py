"""The model of a caller as the pipeline takes it: `HeldModel` holds any module, with its loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.checkpoint.pretrained import IsoPrunePreTrainedModel
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models.nested import tensors_of
from isoprune_hf.models.objective import Objective, OutputNorm, TargetLoss, chooses_class

CLASSES = TargetLoss("cross_entropy", has_logits=True)
LABELS = TargetLoss("binary_cross_entropy", has_logits=True)
LOSS_NAMES: Mapping[str | None, str] = MappingProxyType(
    {
        "single_label_classification": "cross_entropy",
        "multi_label_classification": "binary_cross_entropy",
        "regression": "squared_error",
    }
)  # of the problem types of transformers

_REPEATED = 1e-2  # by which two passes may differ, relative to the norm: kernels of GPUs add in any order


@dataclass
class HeldOutput(ImageClassifierOutput):
    """The outputs of a held model: `logits`, by which models are compared, and all tensors that the module returned.

    Args:
        outputs: The tensors; of a task that names outputs, these.
    """

    outputs: tuple[Tensor, ...] | None = None


class HeldModel(IsoPruneForImageClassification):
    """A module with the loss that it is scored for.

    The config describes the base only if the module is one of a library; for other modules `config.base` is None.

    Args:
        config: Config with the size of one input as `image_size`.
        module: The module, which takes one tensor (B, ...); by default it is built from the config.
        objective: The loss; by default the cross-entropy.
    """

    def __init__(self, config: IsoPruneConfig, module: nn.Module | None = None, objective: Objective = CLASSES):
        if module is None:
            IsoPrunePreTrainedModel.__init__(self, config)  # of any task
        else:
            PreTrainedModel.__init__(self, config)  # type: ignore[no-untyped-call]  # untyped in transformers
            self.model = module
        self.objective = objective

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> HeldOutput:
        """Run the module.

        Args:
            pixel_values: Inputs (B, ...).
            labels: Targets for the loss, (B, ...).
        """
        pixel_values = pixel_values.to(self.dtype)
        outputs = tensors_of(self.model(pixel_values), task_of(self.config.base).outputs)
        loss = None if labels is None else self.objective.summed_loss(outputs, labels, pixel_values) / len(labels)
        return HeldOutput(loss=loss, logits=self.objective.logits(outputs), outputs=outputs)


def objective_of(model: IsoPruneForImageClassification) -> Objective:
    """Return the loss that a model is scored for: that of a held model, or of the problem type of its config."""
    if isinstance(model, HeldModel):
        return model.objective
    name = LOSS_NAMES.get(model.config.problem_type, CLASSES.name)
    return {CLASSES.name: CLASSES, LABELS.name: LABELS}.get(name) or TargetLoss(name)


def reads_labels(model: nn.Module) -> bool:
    """Return whether a model is trained and scored with labels: all but held ones whose loss has none."""
    return not isinstance(model, HeldModel) or model.objective.reads_labels


@torch.no_grad()
def output_shapes(model: IsoPruneForImageClassification) -> list[list[int]]:
    """Return the shapes of all outputs of a held model for one image."""
    blank = torch.zeros(1, *(model.config.image_size or ()), device=model.device)
    return [list(value.shape[1:]) for value in model(pixel_values=blank).outputs or ()]


@torch.no_grad()
def require_repeatable(model: HeldModel) -> None:
    """Check that a network without labels gives the same outputs in two passes, so that a cut network can keep them.

    Raises:
        UnsupportedArchitectureError: It draws random numbers in eval mode, as ViTMAE its masks.
    """
    blank = torch.zeros(1, *(model.config.image_size or ()), device=model.device)
    passes = [model(pixel_values=blank).outputs or () for _ in range(2)]
    for first, second in zip(*passes, strict=True):
        if (first - second).float().norm() > _REPEATED * first.float().norm():
            raise UnsupportedArchitectureError(
                f"{type(model.model).__name__}: its outputs are random in eval mode, and no cut can keep them; open "
                "its weights as a class that draws nothing, such as those of ViTMAE as ViTModel"
            )


def loss_of_batch(model: IsoPruneForImageClassification, pixel_values: Tensor, labels: Tensor) -> Tensor:
    """Run a model and return its loss summed over the images, see `objective_of`.

    Args:
        model: A base, a pruned or a held model.
        pixel_values: (B, C, H, W).
        labels: (B,) for classes, otherwise the targets of the loss, (B, ...).
    """
    output = model(pixel_values=pixel_values)
    outputs = output.outputs if isinstance(model, HeldModel) else [output.logits]
    return objective_of(model).summed_loss(outputs, labels, pixel_values)


def with_probe_loss(
    model: IsoPruneForImageClassification, samples: int
) -> tuple[IsoPruneForImageClassification, Tensor]:
    """Return a model with a loss for random images, and targets for that loss; the module is shared."""
    if isinstance(model, HeldModel):
        return HeldModel(model.config, model.model, OutputNorm(model.objective.logits)), torch.zeros(samples)
    count = model.config.num_labels or 1
    if not chooses_class(objective_of(model)):
        return model, torch.zeros(samples, count, device=model.device)
    return model, torch.arange(samples, device=model.device) % count
