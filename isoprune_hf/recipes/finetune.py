"""The sections `finetune` and `pretrain`: how weights are trained."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes.values import check_range


@dataclass(frozen=True)
class FinetuneRecipe:
    """How weights are trained: after the cut, or before it for a base that starts from random weights.

    Args:
        epochs: Passes over the training split; 0 leaves the weights as they are.
        batch_size: Images for one update over all ranks and accumulation steps.
        grad_accumulation: Micro-batches that one rank adds up for an update.
        optimizer: adamw or sgd.
        learning_rate: Peak learning rate, for the whole batch.
        momentum: Momentum of sgd.
        weight_decay: Decay of all parameters with two or more dims; biases, norms and scales have none.
        clip_grad: Largest norm of the gradient.
        schedule: cosine, or step (times `step_gamma` every `step_epochs`), per update.
        warmup_epochs: Epochs of linear warm-up.
        min_learning_rate: Where cosine ends.
        step_epochs: Epochs between two steps of the step schedule.
        step_gamma: Factor of a step.
        label_smoothing: Share of the target that goes to all classes.
        distillation: soft (the teacher's distribution), hard (its top class) or none.
        teacher: auto (the dense base, where it has trained weights), none, or a name or folder as for `prune.model`.
        distillation_weight: Share of the teacher in the loss, from 0 to 1.
        temperature: Softens both distributions of soft distillation.
        precision: no (fp32) or bf16.
        crop_scale: Smallest and largest share of the image area that a random crop keeps; [1, 1] is the evaluation
            transform.
        hflip: Probability of a horizontal flip.
        auto_augment: Policy string of timm, as rand-m9-mstd0.5-inc1.
        random_erasing: Probability of erasing a box.
        evaluate_every: Epochs between two evaluations; the last epoch is always evaluated.
        seed: Seed of order, augmentation and dropout.
    """

    section: ClassVar[str] = "finetune"
    epochs: int = 30
    batch_size: int = 64
    grad_accumulation: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.05
    clip_grad: float | None = None
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_epochs: float = 0
    min_learning_rate: float = 0.0
    step_epochs: int = 30
    step_gamma: float = 0.1
    label_smoothing: float = 0.1
    distillation: Literal["none", "soft", "hard"] = "soft"
    teacher: str = "auto"
    distillation_weight: float = 0.5
    temperature: float = 1.0
    precision: Literal["no", "bf16"] = "no"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    auto_augment: str | None = None
    random_erasing: float = 0.0
    evaluate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accumulation", "step_epochs", "evaluate_every"):
            check_range(self.section, name, getattr(self, name), 1)
        for name in ("epochs", "warmup_epochs", "learning_rate", "min_learning_rate", "weight_decay", "seed"):
            check_range(self.section, name, getattr(self, name), 0)
        for name in ("momentum", "label_smoothing", "distillation_weight", "hflip", "random_erasing", "step_gamma"):
            check_range(self.section, name, getattr(self, name), 0, 1)
        if self.temperature <= 0:
            raise RecipeError(f"{self.section}.temperature must be above 0, got {self.temperature}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise RecipeError(
                f"{self.section}.crop_scale must be two numbers with 0 < low <= high <= 1, got {list(self.crop_scale)}"
            )
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise RecipeError(f"{self.section}.clip_grad must be above 0, got {self.clip_grad}")


@dataclass(frozen=True)
class PretrainRecipe(FinetuneRecipe):
    """How a base with random weights is trained before the cut; by default it is not. Settings as in `finetune`."""

    section: ClassVar[str] = "pretrain"
    epochs: int = 0
