"""The sections `finetune` and `pretrain`: how to train weights."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import ClassVar, Literal

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes.values import (
    IGNORED_FOR_RESUME,
    IMAGES,
    MINUTES,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    Range,
    above_zero,
    check_choices,
    check_numbers,
    whole,
)

_TORCH_OPTIMIZERS = ("adamw", "sgd")
_SHARES = ("momentum", "label_smoothing", "teacher_label_smoothing", "distillation_weight", "hflip", "random_erasing")
_INTERVALS = ("step_epochs", "steps_per_epoch", "evaluate_every", "save_every", "state_every", "log_every")
RANGES = {
    **dict.fromkeys((*_SHARES, "step_gamma"), SHARE),
    **dict.fromkeys(("ema_decay", "dropout", "drop_path"), SHARE_BELOW_ONE),
    **dict.fromkeys(_INTERVALS, whole(1, 10**9)),
    **dict.fromkeys(("grad_accumulation", "virtual_replicas"), whole(1, 2**16)),
    **dict.fromkeys(("learning_rate", "min_learning_rate", "weight_decay", "mixup", "cutmix"), Range(0, 10**4)),
    **dict.fromkeys(("layer_decay", "crop_scale"), above_zero(1)),
    "epochs": whole(0, 10**6),
    "batch_size": IMAGES,
    "repeated_augmentation": whole(1, 1024),
    "clip_grad": above_zero(10**12),
    "max_bad_steps": whole(0, 10**9),
    "rank_minutes": above_zero(MINUTES.high),
    "max_minutes": above_zero(MINUTES.high),
    "state_minutes": MINUTES,
    "warmup_epochs": Range(0, 10**6),
    "temperature": Range(1e-3, 10**4),
    "peak_tflops": above_zero(10**9),
    "seed": SEED,
}


def list_optimizers() -> list[str]:
    """List the names of timm's optimizers that can be used.

    Those that need other packages or second derivatives, or whose state is more than tensors and numbers, are left
    out. timm is imported only here: opening a pruned model needs no optimizer.
    """
    names: list[str] = import_module("timm.optim").list_optimizers(
        exclude_filters=["bnb*", "fused*", "adahessian", "kron*"]
    )
    return names


@dataclass(frozen=True)
class FinetuneRecipe:
    """Settings for training the pruned model.

    Args:
        epochs: Passes over the training split; 0 does not train.
        steps_per_epoch: Updates in an epoch; by default as many as the training split has images for.
        batch_size: Images per update over all ranks and accumulation steps.
        grad_accumulation: Micro-batches that each rank accumulates for an update.
        virtual_replicas: Parts of the batch that BatchNorm, mixup and dropout see. Any number of ranks that divides it
            trains the same model; the default is ranks x grad_accumulation.
        drop_last: Drop the images that do not fill the last batch; false also trains on them.
        repeated_augmentation: Copies of an image in an epoch, each augmented differently; the length of the epoch is
            unchanged, so it has fewer different images.
        optimizer: adamw or sgd of torch, or the name of one of timm, such as lamb, lion or adan.
        learning_rate: Peak learning rate for the whole batch.
        momentum: Momentum of sgd, and of the optimizers of timm that have one.
        weight_decay: Decay of the parameters that `weight_decay_rule` selects.
        weight_decay_rule: no_bias_norm: parameters with two or more dims; timm: the same without tokens, positions and
            other exceptions of the network; all: every parameter.
        clip_grad: Largest norm of the gradient, or largest value by `clip_mode`.
        clip_mode: norm; value: the largest entry of the gradient; agc: the largest ratio of gradient norm to weight
            norm in each unit, except in the last layer.
        layer_decay: Factor of the learning rate from each layer to the one below it; the last layer has factor 1.
        max_bad_steps: Consecutive updates that may be skipped because loss or gradient is not finite; one more stops
            the training.
        rank_minutes: Longest time that a rank waits for another one before the run stops.
        max_minutes: Time after which the run saves its state and stops, as on a signal; the same command resumes it.
        schedule: cosine, or step (multiply by `step_gamma` every `step_epochs`).
        schedule_unit: Change the learning rate with each update or with each epoch.
        warmup_epochs: Epochs of linear warm-up.
        min_learning_rate: Final learning rate of cosine.
        step_epochs: Epochs between two steps of the step schedule.
        step_gamma: Factor of a step.
        ema_decay: Decay per update of an exponential moving average of the weights; off by default.
        best: Weights whose top-1 selects the best epoch, and that are the result: raw or ema.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Alpha of mixup; 0 is off.
        cutmix: Alpha of cutmix; 0 is off. If both are on, each part of a batch uses one of them.
        mixup_pairing: Mix an image with its mirror position in its part (flip, as timm) or with the one before it
            (roll, as torchvision).
        distillation: soft (distribution of the teacher), hard (its top class) or none.
        distillation_head: Output that learns from the teacher: logits, or only the distillation token (DeiT), while
            the class token learns from the labels.
        teacher: auto (the dense base if it has trained weights), none, or a name or folder as for `prune.model`.
        teacher_cache: Folder for the logits of the teacher, which are computed once and then read. Requires that an
            image looks the same in each epoch: no random crop, flip, policy, erasing or mixing.
        teacher_label_smoothing: `label_smoothing` of the teacher's term in hard distillation.
        distillation_weight: Weight of the teacher's term in the loss, from 0 to 1.
        temperature: Softens both distributions of soft distillation.
        precision: no (fp32), bf16, or fp16 with loss scaling.
        teacher_precision: Precision of the teacher's weights and passes; by default that of the student, with fp32
            weights.
        channels_last: Memory format of images, student and teacher.
        torch_compile: Compile student and teacher.
        grad_checkpointing: Recompute the activations of each block in the backward pass instead of storing them.
        dropout: Rate of dropout before the classifier; by default that of the model.
        drop_path: Rate of stochastic depth at the last residual block, rising from 0 at the first; by default that of
            the model.
        crop_scale: Smallest and largest share of the image area in a random crop; [1, 1] is the evaluation transform.
        interpolation: Interpolation of random crops: bilinear, bicubic or random; by default that of the processor.
        hflip: Probability of a horizontal flip.
        auto_augment: Policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or 3a; or of torchvision, whose
            strengths differ: tv-rand-n2-m9, tv-auto, tv-trivial or tv-augmix.
        random_erasing: Probability of erasing a box.
        random_erasing_fill: Fill of the box: zero, or noise in every pixel.
        evaluate_every: Epochs between two evaluations; the last epoch is always evaluated.
        save_every: Epochs between two checkpoints that are kept in addition to the last and the best.
        state_every: Updates between two training states, from which the same command resumes; one is also saved at the
            end of each epoch.
        state_minutes: Longest time between two training states.
        log_every: Updates between two logged ones; each epoch is logged.
        peak_tflops: Peak throughput of one device at this precision from its data sheet, in 10^12 operations per
            second; the log then reports the share that the training uses.
        tracker: Service that also receives the log, if its package is installed: tensorboard, trackio or wandb.
        seed: Seed of order, augmentation and dropout.
    """

    section: ClassVar[str] = "finetune"
    epochs: int = 30
    steps_per_epoch: int | None = None
    batch_size: int = 64
    grad_accumulation: int = 1
    virtual_replicas: int | None = None
    drop_last: bool = True
    repeated_augmentation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.05
    weight_decay_rule: Literal["all", "no_bias_norm", "timm"] = "no_bias_norm"
    clip_grad: float | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    layer_decay: float | None = None
    max_bad_steps: int = 0
    rank_minutes: float = field(default=30.0, metadata=IGNORED_FOR_RESUME)
    max_minutes: float | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    schedule: Literal["cosine", "step"] = "cosine"
    schedule_unit: Literal["update", "epoch"] = "update"
    warmup_epochs: float = 0
    min_learning_rate: float = 0.0
    step_epochs: int = 30
    step_gamma: float = 0.1
    ema_decay: float | None = None
    best: Literal["raw", "ema"] = "raw"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_pairing: Literal["flip", "roll"] = "flip"
    distillation: Literal["none", "soft", "hard"] = "soft"
    distillation_head: Literal["logits", "token"] = "logits"
    teacher: str = "auto"
    teacher_cache: str | None = None
    teacher_label_smoothing: float = 0.0
    distillation_weight: float = 0.5
    temperature: float = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    teacher_precision: Literal["no", "bf16", "fp16"] | None = None
    channels_last: bool = False
    torch_compile: bool = False
    grad_checkpointing: bool = False
    dropout: float | None = None
    drop_path: float | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    interpolation: Literal["bilinear", "bicubic", "random"] | None = None
    hflip: float = 0.5
    auto_augment: str | None = None
    random_erasing: float = 0.0
    random_erasing_fill: Literal["zero", "pixel"] = "zero"
    evaluate_every: int = 1
    save_every: int | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    state_every: int | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    state_minutes: float = field(default=30.0, metadata=IGNORED_FOR_RESUME)
    log_every: int = field(default=50, metadata=IGNORED_FOR_RESUME)
    peak_tflops: float | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = field(default=None, metadata=IGNORED_FOR_RESUME)
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self.section, self)
        check_numbers(self.section, self, RANGES)
        if self.optimizer not in _TORCH_OPTIMIZERS and self.optimizer not in list_optimizers():
            raise RecipeError(
                f"{self.section}.optimizer must be adamw, sgd or one of timm ({', '.join(list_optimizers())}), got "
                f"{self.optimizer!r}"
            )
        if len(self.crop_scale) != 2 or self.crop_scale[0] > self.crop_scale[1]:
            raise RecipeError(
                f"{self.section}.crop_scale must be two numbers with 0 < low <= high <= 1, got {list(self.crop_scale)}"
            )
        if self.best == "ema" and self.ema_decay is None:
            raise RecipeError(f"{self.section}.best ema needs {self.section}.ema_decay, as 0.9999")
        if self.virtual_replicas is not None and self.grad_accumulation > 1:
            raise RecipeError(
                f"{self.section}.virtual_replicas {self.virtual_replicas} determines how many micro-batches are "
                f"accumulated: omit {self.section}.grad_accumulation {self.grad_accumulation}"
            )
        if self.teacher_cache is not None:
            self._check_fixed_view()
        if (self.mixup or self.cutmix) and self.mixup_pairing == "flip" and not self.drop_last:
            raise RecipeError(
                f"{self.section}.mixup_pairing flip needs an even number of images in each part of a batch, which a "
                f"short last batch may not have: set {self.section}.drop_last true, or mixup_pairing roll"
            )

    def _check_fixed_view(self) -> None:
        """Check that an image looks the same in each epoch."""
        fixed: dict[str, object] = {
            "mixup": 0,
            "cutmix": 0,
            "auto_augment": None,
            "random_erasing": 0,
            "hflip": round(self.hflip),
        }
        needed = {name: value for name, value in fixed.items() if getattr(self, name) != value}
        if tuple(self.crop_scale) != (1, 1):
            needed["crop_scale"] = [1, 1]
        if needed:
            raise RecipeError(
                f"{self.section}.teacher_cache needs the same view of an image in each epoch, got "
                f"{', '.join(f'{name} {getattr(self, name)}' for name in needed)}; set "
                f"{', '.join(f'{name} {value}' for name, value in needed.items())}, or leave the cache out"
            )


@dataclass(frozen=True)
class PretrainRecipe(FinetuneRecipe):
    """Settings for training a base with random weights before the cut; off by default. See `FinetuneRecipe`."""

    section: ClassVar[str] = "pretrain"
    epochs: int = 0
