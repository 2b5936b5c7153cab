"""Criteria by what their scores are, presets, and the defaults of settings that depend on both: `default_settings`."""

from typing import Any, Literal, get_args

BUDGETS = ("target_macs", "target_params", "target_latency")
# The names of all criteria; each is a file in `pruning/scoring/criteria`. Those of the first two kinds read images.
LossCriterion = Literal["gate_fisher", "gate_fisher_joint", "trial_loss"]  # scores are losses in nats
DataCriterion = Literal[
    "taylor", "taylor_l2", "taylor_reference", "hessian", "hessian_reference", "activation_variance"
]
WeightCriterion = Literal["l1", "l2", "bn_scale", "fpgm", "lamp", "random"]
Criterion = Literal[LossCriterion, DataCriterion, WeightCriterion]
LOSS_CRITERIA: tuple[str, ...] = get_args(LossCriterion)
DATA_CRITERIA: tuple[str, ...] = (*LOSS_CRITERIA, *get_args(DataCriterion))
WEIGHT_CRITERIA: tuple[str, ...] = get_args(WeightCriterion)
# Preset -> setting -> value; a recipe that sets another value is refused.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "criterion": "trial_loss",
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

# Scores that are no losses rank the channels of a layer better than layers: groups are divided by their means, and
# every class gives up the same share of its channels.
_OF_NO_LOSSES = {"allocation": "class", "normalizer": "mean"}
# Without images nothing is rotated or repaired, and weights alone do not say that a layer can lose nearly everything.
_WITHOUT_IMAGES = {"rotate": False, "reconstruct": "none"}
_LARGEST_SHARE = 0.75


def default_settings(criterion: str | None, *, has_images: bool, preset: str | None = None) -> dict[str, Any]:
    """Return the values of the settings that have none until a recipe is settled.

    They are those of `best`, but for scores that are no losses, and where there are no images. A named preset is
    complete.

    Args:
        criterion: The named criterion, or that of the scores.
        has_images: There are images to score on or to repair with.
        preset: The named preset.
    """
    plain = {"normalizer": "none", "max_ratio": 1.0}
    if preset is not None:
        return plain | PRESETS[preset]
    values = PRESETS["best"] | plain
    if criterion is not None:
        values["criterion"] = criterion
    if values["criterion"] not in LOSS_CRITERIA:
        values |= _OF_NO_LOSSES
    if not has_images:
        values |= _WITHOUT_IMAGES
        if criterion in WEIGHT_CRITERIA:
            values["max_ratio"] = _LARGEST_SHARE
    return values
