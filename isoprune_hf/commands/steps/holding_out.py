"""Hold out the same images for every model of a data set: `settle_holdout`; the rest are the exceptions.

`has_seen` finds models that have seen images for evaluation, `may_have_seen` folders that do not record it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from accelerate.logging import get_logger
from transformers import PreTrainedConfig

from isoprune_hf.checkpoint.folder import read_json
from isoprune_hf.checkpoint.stock import isoprune_fields
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.recipes import DATA_CRITERIA, DataRecipe
from isoprune_hf.recipes.data import DEFAULT_HOLDOUT

logger = get_logger(__name__)


def settle_holdout(data: DataRecipe, model: str | None, *, otherwise: float | None = None) -> DataRecipe:
    """Return the data section with the share of images that is held out, unless it is set.

    It is the share by which the folder of a model was pruned or trained on the same data set.

    Args:
        data: The section as it was given.
        model: Name of the model.
        otherwise: The share for another data set; None is the default one.

    Raises:
        RecipeError: The folder records something else than a share.
    """
    if data.holdout is not None:
        return data
    config = None if model is None else read_json(model, "config.json")
    fields = None if config is None else isoprune_fields(config)
    recorded = _recorded_share((fields or {}).get("recipe"), str(data.dataset))
    share = otherwise if recorded is None else recorded
    return data if share == DEFAULT_HOLDOUT else replace(data, holdout=share)


def has_seen(config: PreTrainedConfig, images: ImageData) -> bool:
    """Return whether a model was pruned or trained on images for evaluation, by the record in its config."""
    recorded = _recorded_share(getattr(config, "recipe", None), images.name)
    if images.holdout is None or recorded is None:
        return False
    return images.holdout == 0 or images.holdout != recorded


def may_have_seen(config: PreTrainedConfig, images: ImageData) -> bool:
    """Return whether a model was pruned or trained on a data set with no record of the images that were held out.

    Earlier versions wrote such folders. A model that was only evaluated on the data set has seen none of its images.
    """
    recipe = getattr(config, "recipe", None)
    if images.holdout is None or not isinstance(recipe, Mapping):
        return False
    data, prune = recipe.get("data"), recipe.get("prune")
    if not isinstance(data, Mapping) or data.get("dataset") != images.name or "holdout" in data:
        return False
    steps = prune if isinstance(prune, Mapping) else {}
    has_read = steps.get("criterion") in DATA_CRITERIA or steps.get("reconstruct") not in (None, "none")
    return has_read or bool(steps.get("rotate")) or "finetune" in recipe or "pretrain" in recipe


def _recorded_share(recipe: Any, dataset: str) -> Any:
    """Return the share that a recipe records as held out of a data set; None if it records none.

    Folders of earlier versions, and models that were only evaluated on the data set, record none.
    """
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    if not isinstance(data, Mapping) or data.get("dataset") != dataset or "holdout" not in data:
        return None
    if data.get("streaming"):
        return 0.0
    return DEFAULT_HOLDOUT if data["holdout"] is None else data["holdout"]
