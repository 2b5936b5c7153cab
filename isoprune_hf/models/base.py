"""Build, wrap and label a base model; shared by the openers of all libraries."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.difference import build_pruned
from isoprune_hf.checkpoint.finite import describe_not_finite
from isoprune_hf.checkpoint.image_pass import take_images
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.checkpoint.pretrained import align_tensors
from isoprune_hf.checkpoint.rebuild import record_settings
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.errors import CheckpointError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.models.drawn_targets import loss_without_labels
from isoprune_hf.models.held import HeldModel

OTHER_TASK = "not an image classifier; choose a model with a classification head"
UNTRAINED = "--prune.pretrained false (in evaluate: --pretrained false)"


class BaseModel(NamedTuple):
    """A model and the image processor that produces its input."""

    model: IsoPruneForImageClassification
    processor: BaseImageProcessor


def draw_base(config: IsoPruneConfig, seed: int) -> nn.Module:
    """Build the network of `config` with random weights from `seed`; the global random state is not changed.

    Raises:
        RecipeError: The library cannot build the base.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return build_pruned(config)
        except CheckpointError as error:
            raise RecipeError(f"prune.model or prune.model_args: {error}") from error


def wrap_module(config: IsoPruneConfig, module: nn.Module) -> IsoPruneForImageClassification:
    """Wrap the model of a library, and set it to eval mode.

    Args:
        config: Config that builds the model; attributes and module types that trained weights bring along are added.
        module: The model.

    Raises:
        UnsupportedArchitectureError: `config` builds another model, so a saved folder could not be opened.
    """
    model = _on_meta(config)
    before = config.base
    record_settings(config, model.model, module)
    if config.base != before:
        model = _on_meta(config)
    built, found = (
        {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} for network in (model.model, module)
    )
    for name in sorted(built.keys() | found.keys()):
        if built.get(name) != found.get(name):
            raise UnsupportedArchitectureError(
                f"{type(module).__name__} cannot be rebuilt only from its name and arguments: tensor {name!r} is "
                f"{found.get(name, 'not in it')} and would be {built.get(name, 'missing')}"
            )
    align_tensors(module)
    model.model = take_images(module) if task_of(config.base).reads_texts else module
    model.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
    return model


def _on_meta(config: IsoPruneConfig) -> IsoPruneForImageClassification:
    """Build the model of a config without weights; on a real device transformers would initialise all of them."""
    with torch.device("meta"):
        return IsoPruneForImageClassification(config) if task_of(config.base).has_classes else hold_unlabelled(config)


def hold_unlabelled(config: IsoPruneConfig, module: nn.Module | None = None) -> HeldModel:
    """Return a network of a task without labels as the pipeline takes it, with the loss that it is scored for.

    Args:
        config: Config that builds the network.
        module: The network; by default it is built.
    """
    return HeldModel(config, module, loss_without_labels(task_of(config.base), config.num_labels))


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Return the two label maps of a config.

    Raises:
        RecipeError: A name is no text.
    """
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise RecipeError(f"model: the names of classes must be texts, got {wrong[0]!r:.99}")
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def require_finite_base(base: BaseModel, name: str) -> None:
    """Check that the saved tensors of an opened model are finite, so that figures of it mean something.

    Args:
        base: The model.
        name: Its name, for the message.

    Raises:
        RecipeError: One is not; the message names it.
    """
    fault = describe_not_finite(base.model.model)
    if fault is not None:
        raise RecipeError(
            f"model: {name} cannot be used: {fault}; its weights are damaged or its training has diverged"
        )


def default_labels(count: int) -> tuple[str, ...]:
    """Return the label names that transformers uses when none are given."""
    return tuple(f"LABEL_{index}" for index in range(count))


def without_head(place: str) -> RecipeError:
    """Return the error for an encoder that is opened without a number of labels."""
    return RecipeError(
        f"model: {place} is an encoder without a classification head; for a new head, set --prune.num_labels (in "
        "evaluate: --num_labels) to a number of classes, or to data for those of the data set; finetune takes the "
        "folder that prune then writes; for its features, prune and evaluate take it as it is"
    )


def single_line(error: Exception) -> str:
    """Return the message of a library's exception as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def unreadable(place: str, error: Exception) -> RecipeError:
    """Return the error for weights or a config that cannot be read from a folder or fetched from the Hub."""
    if os.path.isdir(place):
        return RecipeError(
            f"model: the weights or config in {place} cannot be opened: {single_line(error)}; "
            f"for random weights, use {UNTRAINED}"
        )
    return RecipeError(
        f"model: the weights or config of {place!r} are not on this machine and could not be fetched "
        f"({type(error).__name__}); check the name and the network, or use random weights with "
        f"{UNTRAINED}"
    )
