"""The section `prune`: how to open, score and cut a base."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes.budget import Budget
from isoprune_hf.recipes.presets import BUDGETS, DATA_CRITERIA, PRESETS, Criterion, default_settings
from isoprune_hf.recipes.values import (
    IGNORED_FOR_RESUME,
    IMAGES,
    MINUTES,
    SEED,
    SHARE,
    Interpolation,
    Range,
    RuntimeName,
    check_choices,
    check_numbers,
    whole,
)

RANGES = {
    **dict.fromkeys(("ratio", "head_ratio", "head_dim_ratio", "max_ratio", "ratios"), SHARE),
    **dict.fromkeys(("min_keep", "round_to", "calibration_batches"), whole(1, 2**20)),
    **dict.fromkeys(("batch_size", "latency_batch_size"), IMAGES),
    "num_labels": Range(1, 2**20, whole=True, or_text=True),
    "remove_blocks": Range(0, 20_000, whole=True, or_text=True),
    "steps": whole(1, 1000),
    "state_minutes": MINUTES,
    "seed": SEED,
}


@dataclass(frozen=True)
class PruneRecipe:
    """Settings for opening, scoring and cutting a base.

    Args:
        model: Base to prune: `timm/NAME`, `torchvision/NAME`, a transformers Hub id, or a folder.
        pretrained: Load the trained weights; false draws seeded random ones without network access.
        weights: File with the trained weights of the base, in place of the published ones: a state dict as safetensors
            or of torch.save, possibly inside a checkpoint. The head gets the size of the one in the file.
        model_args: Arguments of the architecture for a timm or torchvision name without its trained weights, such as
            {img_size: 64}.
        num_labels: Replace the head of the base: a number of classes, or `data` for the classes of the data set.
        preset: Named values of the settings below: best (highest accuracy in our measurements), paper (the method as
            the paper describes it), reference (torch-pruning 1.6.1). Without a preset the values of best are defaults.
        criterion: How channels are scored. From images: gate_fisher (the loss that removing a channel costs),
            gate_fisher_joint (the same after removing all channels of its group that cost less), trial_loss (the
            default; the same after a repair, from trial cuts), taylor,
            taylor_l2 (the norm of the paper), hessian, activation_variance; for parity with old scripts
            taylor_reference and hessian_reference. From weights only: l1, l2, bn_scale, fpgm, lamp, random.
        score_batchnorm: Include the scales and shifts of BatchNorm in scores; torch-pruning does not.
        reduction: How to combine the coupled layers of a channel: sum or mean.
        normalizer: Divisor of the scores of a group before groups compete: none, mean or max. By default none for
            losses (gate_fisher, gate_fisher_joint, trial_loss), mean for those of other criteria.
        scoring_precision: no (fp32) or bf16 for the scoring passes; bf16 reports its rank correlation with fp32.
        allocation: class shares the cut by the ratios, one for each kind of channel; knapsack lets the channels of all
            classes compete by loss per saved MAC (or parameter, or millisecond) regardless of scope. By default
            knapsack for losses, see normalizer, and class for others.
        scope: Which groups compete: isomorphic (equal sub-structures), global (all), local (none).
        scopes: Custom scopes, such as {"blocks.0.*": first}: groups whose names match a pattern compete in the scope
            of that name; all others by `scope`.
        signature: Which sub-structures are equal: paper (same layer types and sides) or strict (also same kernels,
            strides, groups and edges between layers).
        engine: Engine that finds the coupled groups: axes (follows every dim of every tensor), or torch-pruning.
        ratio: Fraction of the channels to remove, from 0 to 1.
        head_ratio: Fraction of the attention heads to remove.
        head_dim_ratio: Fraction of the dims inside the heads to remove; the default is `ratio`.
        ratios: Fixed fractions for groups by name, such as {"blocks.0.*": 0.2}; a budget changes only the others.
        include: Patterns of group names; only these groups are cut.
        exclude: Patterns of group names that are not cut.
        head_dims: per_head removes the weakest dims of each head, shared the same dims from all kept heads; shared_all
            also counts the scores of the removed heads.
        remove_blocks: Residual blocks to remove: a number, names, numbers by pattern such as {"stages.2.*": 18}, or
            `auto` for the same fraction as of channels.
        target_macs: Budget instead of ratios: 4.2G, 350M, or a share of the base in per cent. The ratios then only
            determine how the cut is shared.
        target_params: Budget of parameters: 20M, or a share of the base.
        target_latency: Budget of the time of a forward pass on this machine: 12ms, or a share of the base.
        latency_batch_size: Images in the timed batch.
        latency_precision: no (fp32) or bf16 weights and images in the timed passes.
        latency_backend: Runtime of the timed passes: eager, channels_last (with folded BatchNorm), compile
            (torch.compile), onnxruntime or openvino.
        selection: exact removes the requested fraction; threshold removes everything up to a score, and counts the
            dims of an attention once for all heads.
        min_keep: Smallest number of channels (or dims of a head) in any layer.
        max_ratio: Largest fraction to remove from any single layer; by default 1, without images 0.75 or the largest
            ratio.
        round_to: Widths become multiples of this number; 8 suits most hardware.
        rounding: balanced compensates within a class for what rounding removes, down only rounds down.
        rotate: Before scoring, rotate heads into the basis that concentrates them in few dims. By default if there are
            images.
        reconstruct: Repair of the cut model without training: none, bn (new statistics of BatchNorm), bias (mean
            outputs of each layer), least_squares (outputs of each layer). By default least_squares if there are
            images.
        steps: Number of cuts on the way to the ratio or budget, each with a new scoring and a repair.
        calibration_batches: Micro-batches of the training split for scoring.
        batch_size: Images in a micro-batch, on every rank.
        state_minutes: Minutes between two saved states of a scoring; the same command resumes from the last one.
        interpolation: Interpolation when images for scoring are resized; by default that of the evaluation.
        seed: Seed of random weights, of the calibration sample and of the random criterion.
        layout: per-layer gives every layer its own width; uniform (ViT and DeiT of timm and transformers) gives all
            blocks the same sizes, and writes the folder of a stock transformers model.
    """

    model: str | None = None
    pretrained: bool = True
    weights: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    num_labels: int | Literal["data"] | None = None
    preset: Literal["best", "paper", "reference"] | None = None
    criterion: Criterion | None = None
    score_batchnorm: bool = True
    reduction: Literal["sum", "mean"] = "sum"
    normalizer: Literal["none", "mean", "max"] | None = None
    scoring_precision: Literal["no", "bf16"] = "no"
    allocation: Literal["class", "knapsack"] | None = None
    scope: Literal["isomorphic", "global", "local"] = "isomorphic"
    scopes: dict[str, str] = field(default_factory=dict)
    signature: Literal["paper", "strict"] = "paper"
    engine: Literal["axes", "torch-pruning"] = "axes"
    ratio: float = 0.5
    head_ratio: float = 0.0
    head_dim_ratio: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    head_dims: Literal["per_head", "shared", "shared_all"] = "per_head"
    remove_blocks: int | Literal["auto"] | list[str] | dict[str, int] | None = None
    target_macs: str | int | float | None = None
    target_params: str | int | float | None = None
    target_latency: str | int | float | None = None
    latency_batch_size: int = 1
    latency_precision: Literal["no", "bf16"] = "no"
    latency_backend: RuntimeName = "eager"
    selection: Literal["exact", "threshold"] = "exact"
    min_keep: int = 2
    max_ratio: float | None = None
    round_to: int = 8
    rounding: Literal["balanced", "down"] = "balanced"
    rotate: bool | None = None
    reconstruct: Literal["none", "bn", "bias", "least_squares"] | None = None
    steps: int = 1
    calibration_batches: int = 50
    batch_size: int = 64
    state_minutes: float = field(default=10.0, metadata=IGNORED_FOR_RESUME)
    interpolation: Interpolation | None = None
    seed: int = 0
    layout: Literal["per-layer", "uniform"] = "per-layer"

    def __post_init__(self) -> None:
        self._apply_preset()
        check_choices("prune", self)
        check_numbers("prune", self, RANGES)
        targets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise RecipeError(f"prune.{targets[0]} and prune.{targets[1]} are both set; set only one budget")
        if self.allocation == "knapsack":
            for name, needed in (("selection", "exact"), ("normalizer", "none")):
                if getattr(self, name) not in (None, needed):
                    raise RecipeError(
                        f"prune.allocation knapsack compares losses as they are: set prune.{name} {needed} or "
                        f"prune.allocation class, got {getattr(self, name)}"
                    )
            if self.remove_blocks == "auto":
                raise RecipeError(
                    "prune.allocation knapsack removes channels and heads: set prune.remove_blocks to a number "
                    "or names, or prune.allocation to class; got auto"
                )
        _ = self.budget  # parsed here, so that a malformed budget is refused at construction

    @property
    def taken_preset(self) -> str | None:
        """The named preset, or `best` if a settled recipe has all of its values; None otherwise."""
        if self.preset is None and all(getattr(self, name) == value for name, value in PRESETS["best"].items()):
            return "best"
        return self.preset

    @cached_property
    def budget(self) -> Budget | None:
        """The parsed value of `target_macs`, `target_params` or `target_latency`; None if none of them is set."""
        if self.target_macs is not None:
            return Budget.parse(self.target_macs, "macs")
        if self.target_params is not None:
            return Budget.parse(self.target_params, "params")
        if self.target_latency is not None:
            return Budget.parse(self.target_latency, "latency")
        return None

    @property
    def reads_images(self) -> Literal["criterion", "rotate", "reconstruct"] | None:
        """The first setting that reads images of the training split; None if none does."""
        criterion = self.criterion or PRESETS["best"]["criterion"]
        return "criterion" if criterion in DATA_CRITERIA else self.data_step

    @property
    def data_step(self) -> Literal["rotate", "reconstruct"] | None:
        """The first setting other than the criterion that reads images of the training split; None if none does."""
        if self.rotate:
            return "rotate"
        return "reconstruct" if self.reconstruct not in (None, "none") else None

    def settled(self, *, has_images: bool) -> "PruneRecipe":
        """Return the recipe with values for the settings of `best` that it leaves open; named values are kept.

        Args:
            has_images: There are images to score on or to repair with. Without them nothing is rotated or repaired.
        """
        defaults = default_settings(self.criterion, has_images=has_images, preset=self.preset)
        if self.allocation == "knapsack":
            defaults["normalizer"] = "none"
        named = (self.ratio, self.head_ratio, self.head_dim_ratio or 0.0, *self.ratios.values())
        defaults["max_ratio"] = max(defaults["max_ratio"], *named)
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def replaced_by_preset(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings that the preset changed: setting -> (default, value of the preset)."""
        defaults = {setting.name: setting.default for setting in fields(self)}
        values = self._preset_values()
        return {name: (defaults[name], value) for name, value in values.items() if defaults[name] != value}

    def _preset_values(self) -> dict[str, Any]:
        """Return the values of the named preset."""
        return {} if self.preset is None else PRESETS[self.preset]

    def _apply_preset(self) -> None:
        """Apply the values of the named preset to the settings that have their defaults.

        Raises:
            RecipeError: There is no such preset, or a setting contradicts it.
        """
        if self.preset is not None and self.preset not in PRESETS:
            raise RecipeError(f"prune.preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, value in self._preset_values().items():
            given = getattr(self, name)
            if given not in (defaults[name], value):
                raise RecipeError(
                    f"prune.preset {self.preset} takes prune.{name} {value}, got {given}: remove one of the two"
                )
            object.__setattr__(self, name, value)
