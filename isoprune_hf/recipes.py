"""What a user may ask for: frozen dataclasses, one for each section of a recipe file, with their range checks."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from isoprune_hf.errors import RecipeError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MILLISECONDS = {"": 1.0, "US": 1e-3, "MS": 1.0, "S": 1e3}
BUDGETS = ("target_macs", "target_params", "target_latency")
# Criteria that read images; the others read the weights alone.
DATA_CRITERIA = ("taylor", "taylor_l2", "hessian", "hessian_reference", "activation_variance")
Criterion = Literal[
    "taylor",
    "taylor_l2",
    "hessian",
    "hessian_reference",
    "activation_variance",
    "l1",
    "l2",
    "bn_scale",
    "fpgm",
    "lamp",
    "random",
]


@dataclass(frozen=True)
class PruneRecipe:
    """How the base is opened, scored and cut.

    Args:
        model: Base to prune: `timm/NAME`, `torchvision/NAME`, a transformers Hub id, or a folder.
        pretrained: Load the trained weights; false draws seeded random ones, with no network.
        model_args: Arguments of the architecture for a timm or torchvision name without trained weights, as {img_size:
            64}.
        num_labels: Give the base a new head: a number, or `data` for the classes of the data set.
        criterion: What a channel is worth. From data: taylor, taylor_l2 (the paper's norm), hessian,
            hessian_reference (the defect of old scripts, for parity), activation_variance. From the weights alone: l1,
            l2, bn_scale, fpgm, lamp, random.
        score_batchnorm: Let the scales and shifts of BatchNorm count; torch-pruning leaves them out.
        reduction: How the coupled layers of a channel are put together: sum or mean.
        normalizer: What the scores of a group are divided by before groups compete: none, mean or max.
        scoring_precision: no (fp32) or bf16 for the passes that score; bf16 reports how well it ranks as fp32 does.
        scope: Who competes with whom: isomorphic (equal sub-structures), global (all), local (nobody).
        scopes: Scopes of your own, as {"blocks.0.*": first}: groups whose names match a pattern compete in the
            scope that it names; all others by `scope`.
        signature: When sub-structures are equal: paper (layer types and sides) or strict (kernels, strides, groups
            and the edges between layers, too).
        ratio: Fraction of the channels that leaves, from 0 to 1.
        head_ratio: Fraction of the attention heads that leaves.
        head_dim_ratio: Fraction of the dims inside the heads that leaves; the default is `ratio`.
        ratios: Fixed fractions for groups by name, as {"blocks.0.*": 0.2}; a budget moves only the others.
        include: Patterns of group names; only these groups are cut.
        exclude: Patterns of group names that are not cut.
        head_dims: per_head lets each head drop its own weakest dims, shared drops the same dims in all heads.
        remove_blocks: Residual blocks that leave whole: a number, names, or `auto`: the same share as of channels.
        target_macs: Budget instead of ratios: 4.2G, 350M, or a share of the base in per cent. The ratios then only say
            how the cut is shared.
        target_params: The same for parameters: 20M, or a share of the base.
        target_latency: The same for the time of a forward pass on this machine: 12ms, or a share of the base.
        latency_batch_size: Images in the batch that is timed.
        latency_precision: no (fp32) or bf16 weights and images when timed.
        latency_backend: eager or compile (torch.compile).
        min_keep: Channels (or dims of a head) that stay in every layer.
        max_ratio: Largest fraction that may leave any single layer.
        round_to: Widths become multiples of this number; hardware likes 8.
        steps: Cuts on the way to the ratio or budget, with a new scoring before each.
        calibration_batches: Micro-batches of the training split that score the channels.
        batch_size: Images in a micro-batch; the same on every rank.
        seed: Seed of random weights, of the calibration sample and of the random criterion.
    """

    model: str | None = None
    pretrained: bool = True
    model_args: dict[str, Any] = field(default_factory=dict)
    num_labels: int | Literal["data"] | None = None
    criterion: Criterion = "taylor"
    score_batchnorm: bool = True
    reduction: Literal["sum", "mean"] = "sum"
    normalizer: Literal["none", "mean", "max"] = "none"
    scoring_precision: Literal["no", "bf16"] = "no"
    scope: Literal["isomorphic", "global", "local"] = "isomorphic"
    scopes: dict[str, str] = field(default_factory=dict)
    signature: Literal["paper", "strict"] = "paper"
    ratio: float = 0.5
    head_ratio: float = 0.0
    head_dim_ratio: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    head_dims: Literal["per_head", "shared"] = "per_head"
    remove_blocks: int | Literal["auto"] | list[str] | None = None
    target_macs: str | int | float | None = None
    target_params: str | int | float | None = None
    target_latency: str | int | float | None = None
    latency_batch_size: int = 1
    latency_precision: Literal["no", "bf16"] = "no"
    latency_backend: Literal["eager", "compile"] = "eager"
    min_keep: int = 2
    max_ratio: float = 1.0
    round_to: int = 8
    steps: int = 1
    calibration_batches: int = 50
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ratio", "head_ratio", "head_dim_ratio", "max_ratio"):
            _check_range("prune", name, getattr(self, name), 0, 1)
        for name in ("min_keep", "round_to", "steps", "calibration_batches", "batch_size", "latency_batch_size"):
            _check_range("prune", name, getattr(self, name), 1)
        _check_range("prune", "seed", self.seed, 0)
        for pattern, ratio in self.ratios.items():
            _check_range("prune", f"ratios[{pattern!r}]", ratio, 0, 1)
        if isinstance(self.num_labels, int):
            _check_range("prune", "num_labels", self.num_labels, 1)
        if isinstance(self.remove_blocks, int):
            _check_range("prune", "remove_blocks", self.remove_blocks, 0)
        targets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise RecipeError(f"prune.{targets[0]} and prune.{targets[1]} are both set; give one budget")
        for name in targets:
            parse_budget(getattr(self, name), 1, f"prune.{name}")


@dataclass(frozen=True)
class DataRecipe:
    """Where the labelled images come from.

    Args:
        dataset: A Hub id such as ILSVRC/imagenet-1k, a folder of parquet files, a folder with train/CLASS/*.JPEG and
            val/CLASS/*.JPEG, or `digits` (1,797 real handwritten digits that scikit-learn ships).
        revision: Git revision of a Hub data set.
        image_column: Column that holds the image.
        label_column: Column that holds the class.
        train_split: Split for calibration and finetuning.
        eval_split: Split for evaluation.
        batch_size: Images in an evaluation batch on each rank.
        num_workers: Loader processes on each rank.
    """

    dataset: str | None = None
    revision: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    eval_split: str = "validation"
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self) -> None:
        _check_range("data", "batch_size", self.batch_size, 1)
        _check_range("data", "num_workers", self.num_workers, 0)


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
            _check_range(self.section, name, getattr(self, name), 1)
        for name in ("epochs", "warmup_epochs", "learning_rate", "min_learning_rate", "weight_decay", "seed"):
            _check_range(self.section, name, getattr(self, name), 0)
        for name in ("momentum", "label_smoothing", "distillation_weight", "hflip", "random_erasing", "step_gamma"):
            _check_range(self.section, name, getattr(self, name), 0, 1)
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


def _check_range(section: str, name: str, value: float | None, low: float, high: float | None = None) -> None:
    if value is None or (value >= low and (high is None or value <= high)):
        return
    allowed = f"at least {low}" if high is None else f"between {low} and {high}"
    raise RecipeError(f"{section}.{name} must be {allowed}, got {value}")


def parse_budget(budget: str | float, base: float, name: str = "target_macs") -> float:
    """Read a size or a time as people write it.

    Args:
        budget: `4.2G`, `350M`, `12ms`, a plain number, or a share of the base such as `50%`.
        base: The same quantity of the base.
        name: Setting that is named in the error; one that ends in latency is a time.

    Returns:
        The budget: a whole number of units, or milliseconds.

    Raises:
        RecipeError: It is no such size or time, or not above zero.
    """
    is_time = name.endswith("latency")
    units = _MILLISECONDS if is_time else _UNITS
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*|%)\s*", str(budget), re.IGNORECASE)
    unit = match[2].upper() if match else None
    if match is None or float(match[1]) <= 0 or unit not in {*units, "%"}:
        example = "a time such as 12ms, 0.5s or 50%" if is_time else "a size such as 4.2G, 350M or 50%"
        raise RecipeError(f"{name} must be {example}, got {budget!r}")
    value = base * float(match[1]) / 100 if unit == "%" else float(match[1]) * units[unit]
    return value if is_time else round(value)


def recipe_to_dict(recipe: PruneRecipe | DataRecipe | FinetuneRecipe) -> dict[str, Any]:
    """Turn a recipe into plain values for JSON and YAML."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
