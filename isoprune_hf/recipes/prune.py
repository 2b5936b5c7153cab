"""The section `prune`: how a base is opened, scored and cut."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes.budget import Budget
from isoprune_hf.recipes.values import IGNORED_FOR_RESUME, Interpolation, check_range

BUDGETS = ("target_macs", "target_params", "target_latency")
# The names of all criteria; each is a file in `pruning/scoring/criteria`. Those of the first two kinds read images.
LossCriterion = Literal["gate_fisher", "gate_fisher_joint"]  # scores are losses in nats
DataCriterion = Literal[
    "taylor", "taylor_l2", "taylor_reference", "hessian", "hessian_reference", "activation_variance"
]
WeightCriterion = Literal["l1", "l2", "bn_scale", "fpgm", "lamp", "random"]
Criterion = Literal[LossCriterion, DataCriterion, WeightCriterion]
LOSS_CRITERIA: tuple[str, ...] = get_args(LossCriterion)
DATA_CRITERIA: tuple[str, ...] = (*LOSS_CRITERIA, *get_args(DataCriterion))
# Values that a preset gives settings; another value contradicts it and is refused.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "criterion": "gate_fisher_joint",
        "allocation": "knapsack",
        "rotate": True,
        "reconstruct": "least_squares",
        "normalizer": "none",
        "selection": "exact",
    },
    "paper": {
        "criterion": "taylor_l2",
        "score_batchnorm": True,
        "reduction": "sum",
        "normalizer": "none",
        "allocation": "class",
        "scope": "isomorphic",
        "signature": "paper",
        "rotate": False,
        "reconstruct": "none",
    },
    "reference": {
        "criterion": "taylor_reference",
        "score_batchnorm": False,
        "reduction": "mean",
        "normalizer": "mean",
        "allocation": "class",
        "scope": "isomorphic",
        "signature": "paper",
        "engine": "torch-pruning",
        "head_dims": "shared_all",
        "selection": "threshold",
        "rounding": "down",
        "min_keep": 1,
        "max_ratio": 1.0,
        "rotate": False,
        "reconstruct": "none",
        "steps": 1,
        **dict.fromkeys(BUDGETS),
    },
}
# What the settings that are None become beside a criterion that is named.
_PLAIN = {"allocation": "class", "rotate": False, "reconstruct": "none"}


@dataclass(frozen=True)
class PruneRecipe:
    """How the base is opened, scored and cut.

    Args:
        model: Base to prune: `timm/NAME`, `torchvision/NAME`, a transformers Hub id, or a folder.
        pretrained: Load the trained weights; false draws seeded random ones, with no network.
        model_args: Arguments of the architecture for a timm or torchvision name without trained weights, as {img_size:
            64}.
        num_labels: Give the base a new head: a number, or `data` for the classes of the data set.
        preset: Named values of the settings below: best (what kept most accuracy in our measurements), paper (the
            method as its text has it), reference (what torch-pruning 1.6.1 does). With no criterion either: best.
        criterion: What a channel is worth; without a preset all else is then as it stands here. From data: gate_fisher
            (the loss that its removal costs), gate_fisher_joint (the same after the removal of all that cost less in
            its group), taylor, taylor_l2 (the paper's norm), hessian, activation_variance; for parity with old scripts
            taylor_reference and hessian_reference. From the weights alone: l1, l2, bn_scale, fpgm, lamp, random.
        score_batchnorm: Let the scales and shifts of BatchNorm count; torch-pruning leaves them out.
        reduction: How the coupled layers of a channel are put together: sum or mean.
        normalizer: What the scores of a group are divided by before groups compete: none, mean or max.
        scoring_precision: no (fp32) or bf16 for the passes that score; bf16 reports how well it ranks as fp32 does.
        allocation: class shares the cut by the ratios, one for each kind; knapsack lets the channels of all classes
            compete by loss per saved MAC (or parameter, or millisecond), whatever their scope: take gate_fisher_joint.
            Beside a criterion that is named the default is class.
        scope: Who competes with whom: isomorphic (equal sub-structures), global (all), local (nobody).
        scopes: Scopes of your own, as {"blocks.0.*": first}: groups whose names match a pattern compete in the
            scope that it names; all others by `scope`.
        signature: When sub-structures are equal: paper (layer types and sides) or strict (kernels, strides, groups
            and the edges between layers, too).
        engine: What finds the coupled groups: axes (ours: every dim of every tensor), or torch-pruning.
        ratio: Fraction of the channels that leaves, from 0 to 1.
        head_ratio: Fraction of the attention heads that leaves.
        head_dim_ratio: Fraction of the dims inside the heads that leaves; the default is `ratio`.
        ratios: Fixed fractions for groups by name, as {"blocks.0.*": 0.2}; a budget moves only the others.
        include: Patterns of group names; only these groups are cut.
        exclude: Patterns of group names that are not cut.
        head_dims: per_head lets each head drop its own weakest dims, shared drops the same dims in all heads that
            stay; in shared_all those that leave have a say, too.
        remove_blocks: Residual blocks that leave whole: a number, names, numbers by pattern, as {"stages.2.*": 18}, or
            `auto`: the same share as of channels.
        target_macs: Budget instead of ratios: 4.2G, 350M, or a share of the base in per cent. The ratios then only say
            how the cut is shared.
        target_params: The same for parameters: 20M, or a share of the base.
        target_latency: The same for the time of a forward pass on this machine: 12ms, or a share of the base.
        latency_batch_size: Images in the batch that is timed.
        latency_precision: no (fp32) or bf16 weights and images when timed.
        latency_backend: eager or compile (torch.compile).
        selection: exact removes the share that is asked for, threshold all that score at most a threshold, and counts
            the dims of an attention once for all heads.
        min_keep: Channels (or dims of a head) that stay in every layer.
        max_ratio: Largest fraction that may leave any single layer.
        round_to: Widths become multiples of this number; hardware likes 8.
        rounding: balanced makes up for what rounding takes from a class, down only rounds down.
        rotate: Turn heads, before they are scored, into the basis in which few dims carry most; needs data. Beside
            a criterion that is named the default is false.
        reconstruct: What repairs the cut model without training: none, bn (new statistics of BatchNorm), bias (mean
            outputs of each layer), least_squares (outputs of each layer); needs data. Beside a criterion that is named
            the default is none.
        steps: Cuts on the way to the ratio or budget, with a new scoring before each.
        calibration_batches: Micro-batches of the training split that score the channels.
        batch_size: Images in a micro-batch; the same on every rank.
        state_minutes: Time between two states of a scoring, from which the same command goes on.
        interpolation: Of the resize of the images that score; the default is that of evaluation.
        seed: Seed of random weights, of the calibration sample and of the random criterion.
        layout: per-layer lets every layer keep its own width; uniform (ViT and DeiT of timm and transformers) keeps
            equal sizes in all blocks, and the folder is that of a stock transformers model.
    """

    model: str | None = None
    pretrained: bool = True
    model_args: dict[str, Any] = field(default_factory=dict)
    num_labels: int | Literal["data"] | None = None
    preset: Literal["best", "paper", "reference"] | None = None
    criterion: Criterion | None = None
    score_batchnorm: bool = True
    reduction: Literal["sum", "mean"] = "sum"
    normalizer: Literal["none", "mean", "max"] = "none"
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
    latency_backend: Literal["eager", "compile"] = "eager"
    selection: Literal["exact", "threshold"] = "exact"
    min_keep: int = 2
    max_ratio: float = 1.0
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
        self._take_preset()
        for name in ("ratio", "head_ratio", "head_dim_ratio", "max_ratio"):
            check_range("prune", name, getattr(self, name), 0, 1)
        for name in ("min_keep", "round_to", "steps", "calibration_batches", "batch_size", "latency_batch_size"):
            check_range("prune", name, getattr(self, name), 1)
        check_range("prune", "seed", self.seed, 0)
        check_range("prune", "state_minutes", self.state_minutes, 0)
        for pattern, ratio in self.ratios.items():
            check_range("prune", f"ratios[{pattern!r}]", ratio, 0, 1)
        if isinstance(self.num_labels, int):
            check_range("prune", "num_labels", self.num_labels, 1)
        if isinstance(self.remove_blocks, int):
            check_range("prune", "remove_blocks", self.remove_blocks, 0)
        for pattern, count in self.remove_blocks.items() if isinstance(self.remove_blocks, dict) else ():
            check_range("prune", f"remove_blocks[{pattern!r}]", count, 0)
        targets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise RecipeError(f"prune.{targets[0]} and prune.{targets[1]} are both set; give one budget")
        if self.allocation == "knapsack":
            for name, needed in (("selection", "exact"), ("normalizer", "none")):
                if getattr(self, name) != needed:
                    raise RecipeError(
                        f"prune.allocation knapsack compares losses as they are: set prune.{name} {needed} or "
                        f"prune.allocation class, got {getattr(self, name)}"
                    )
            if self.remove_blocks == "auto":
                raise RecipeError(
                    "prune.allocation knapsack removes channels and heads: give prune.remove_blocks a number or "
                    "names or set prune.allocation class, got auto"
                )
        _ = self.budget  # parsed here, so that a malformed budget is refused at construction

    @property
    def taken_preset(self) -> str | None:
        """The preset that is named, or `best` where its values were taken without being named; None for others."""
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
        return "criterion" if self.criterion in DATA_CRITERIA else self.data_step

    @property
    def data_step(self) -> Literal["rotate", "reconstruct"] | None:
        """The first setting other than the criterion that reads images of the training split; None if none does."""
        if self.rotate:
            return "rotate"
        return "reconstruct" if self.reconstruct != "none" else None

    def replaced_by_preset(self) -> dict[str, tuple[Any, Any]]:
        """Name the settings that the preset has changed: setting -> (its default, the value of the preset)."""
        defaults = {setting.name: setting.default for setting in fields(self)}
        taken = PRESETS.get(self.preset, {}).items()
        return {name: (defaults[name], value) for name, value in taken if defaults[name] != value}

    def _take_preset(self) -> None:
        """Give the settings that are left at their defaults the values of the preset.

        Without preset and criterion those of `best` are defaults, which other values may replace; `preset` stays None.
        """
        if self.preset is not None and self.preset not in PRESETS:
            raise RecipeError(f"prune.preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.preset is None:
            for name, value in (PRESETS["best"] if self.criterion is None else _PLAIN).items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, value in PRESETS.get(self.preset, {}).items():
            given = getattr(self, name)
            if given not in (defaults[name], value):
                raise RecipeError(
                    f"prune.preset {self.preset} takes prune.{name} {value}, got {given}: leave out one of the two"
                )
            object.__setattr__(self, name, value)
