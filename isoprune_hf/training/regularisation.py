"""Dropout and stochastic depth during training only: `regularised` adds them to a model and removes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from timm.layers.drop import DropPath
from torch import nn
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.vit.modeling_vit import ViTLayer

from isoprune_hf.checkpoint.modeling_isoprune import SkippedBlock
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe

# Names of the dropout before the classifier in timm and torchvision; some networks keep only its rate, as a number.
_DROPOUTS = ("head_drop", "head.drop", "classifier.0", "drop", "dropout")
_RATE_ATTRIBUTE = "drop_rate"

# Sets an attribute of an object, and remembers its old value.
SetAttribute = Callable[[object, str, object], None]


@contextmanager
def regularised(model: nn.Module, recipe: FinetuneRecipe) -> Iterator[None]:
    """Add the recipe's dropout and stochastic depth to `model` inside the block, in place, and remove them after it.

    Raises:
        RecipeError: The model has no dropout before its classifier, or no stochastic depth in its blocks.
    """
    network = getattr(model, "model", model)
    undo: list[tuple[object, str, object]] = []

    def set_attribute(owner: object, name: str, value: object) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        if recipe.dropout is not None:
            _set_dropout(network, recipe.dropout, set_attribute)
        if recipe.drop_path is not None:
            _set_drop_path(network, recipe.drop_path, set_attribute)
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def _set_dropout(network: nn.Module, rate: float, set_attribute: SetAttribute) -> None:
    modules = dict(network.named_modules())
    found = [modules[name] for name in _DROPOUTS if isinstance(modules.get(name), nn.Dropout)]
    for module in found:
        set_attribute(module, "p", rate)
    if not found and isinstance(vars(network).get(_RATE_ATTRIBUTE), (int, float)):
        set_attribute(network, _RATE_ATTRIBUTE, rate)
    elif not found and rate:
        raise RecipeError(
            f"finetune.dropout {rate}: {type(network).__name__} has no dropout before its classifier; set it to null"
        )


def _set_drop_path(network: nn.Module, rate: float, set_attribute: SetAttribute) -> None:
    """Set rates that grow from 0 at the first block to `rate` at the last, as in timm; removed blocks count too."""
    blocks = []
    for module in network.modules():
        places = _drop_paths(module)
        if places or isinstance(module, SkippedBlock):
            blocks.append(places)
    if rate and not any(blocks):
        kind = type(network).__name__
        raise RecipeError(f"finetune.drop_path {rate}: {kind} has no stochastic depth in its blocks; set it to null")
    for number, places in enumerate(blocks):
        for owner, name in places:
            set_attribute(owner, name, DropPath(rate * number / max(1, len(blocks) - 1)))


def _drop_paths(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return owner and attribute of a block's stochastic depth: an identity in timm and transformers if it is off."""
    if isinstance(module, ViTLayer | DeiTLayer) and not module.dropout.p:
        return [(module, "dropout")]  # at the end of both branches, as in timm's ViT
    return [
        (module, name)
        for name, child in module.named_children()
        if name.startswith("drop_path") and (isinstance(child, nn.Identity) or hasattr(child, "drop_prob"))
    ]
