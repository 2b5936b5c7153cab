"""Dropout and stochastic depth of a model while it trains; nothing of it is saved."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from timm.layers import DropPath
from torch import nn
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.vit.modeling_vit import ViTLayer

from isoprune_hf.checkpoint.modeling_isoprune import SkippedBlock
from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe

# Where timm and torchvision have the dropout before the classifier; some networks keep its rate as a number instead.
_DROPOUTS = ("head_drop", "head.drop", "classifier.0", "drop", "dropout")
_RATE = "drop_rate"
Change = Callable[[object, str, object], None]


@contextmanager
def regularised(model: nn.Module, recipe: FinetuneRecipe) -> Iterator[None]:
    """Give `model` the recipe's dropout and stochastic depth inside the block, and take them away after it.

    Raises:
        RecipeError: The model has no place for them.
    """
    network = getattr(model, "model", model)
    undo: list[tuple[object, str, object]] = []

    def change(owner: object, name: str, value: object) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        if recipe.dropout is not None:
            _set_dropout(network, recipe.dropout, change)
        if recipe.drop_path is not None:
            _set_drop_path(network, recipe.drop_path, change)
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def _set_dropout(network: nn.Module, rate: float, change: Change) -> None:
    modules = dict(network.named_modules())
    found = [modules[name] for name in _DROPOUTS if isinstance(modules.get(name), nn.Dropout)]
    for module in found:
        change(module, "p", rate)
    if not found and isinstance(vars(network).get(_RATE), (int, float)):
        change(network, _RATE, rate)
    elif not found and rate:
        raise RecipeError(
            f"finetune.dropout {rate}: {type(network).__name__} has no dropout before its classifier; leave it out"
        )


def _set_drop_path(network: nn.Module, rate: float, change: Change) -> None:
    """Let the rate grow from 0 at the first block to `rate` at the last one, as timm does; blocks that left count."""
    blocks = []
    for module in network.modules():
        places = _drop_paths(module)
        if places or isinstance(module, SkippedBlock):
            blocks.append(places)
    if rate and not any(blocks):
        kind = type(network).__name__
        raise RecipeError(f"finetune.drop_path {rate}: {kind} has no stochastic depth in its blocks; leave it out")
    for number, places in enumerate(blocks):
        for owner, name in places:
            change(owner, name, DropPath(rate * number / max(1, len(blocks) - 1)))


def _drop_paths(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Places of stochastic depth of a block: timm and transformers have an identity there when the rate is 0."""
    if isinstance(module, ViTLayer | DeiTLayer) and not module.dropout.p:
        return [(module, "dropout")]  # at the end of both branches, where timm's ViT has its two places
    return [
        (module, name)
        for name, child in module.named_children()
        if name.startswith("drop_path") and (isinstance(child, nn.Identity) or hasattr(child, "drop_prob"))
    ]
