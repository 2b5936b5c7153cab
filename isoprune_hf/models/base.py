"""What the bases of all libraries share: the wrapped model, drawn weights, labels, and the words of an error."""

import os
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification, build_base
from isoprune_hf.errors import CheckpointError, RecipeError, UnsupportedArchitectureError

OTHER_TASK = "not an image classifier; give a model with a classification head"


class BaseModel(NamedTuple):
    """A model and the image processor that gives it the pixels it was trained on."""

    model: IsoPruneForImageClassification
    processor: BaseImageProcessor


def draw(config: IsoPruneConfig, seed: int) -> nn.Module:
    """Build the base of `config` with weights drawn from `seed`; the caller's random state is left alone.

    Raises:
        RecipeError: The library cannot build it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return build_base(config)
        except CheckpointError as error:
            raise RecipeError(f"prune.model or model_args: {error}") from error


def wrap(config: IsoPruneConfig, module: nn.Module) -> IsoPruneForImageClassification:
    """Put a library's model, in eval mode, into ours.

    Raises:
        UnsupportedArchitectureError: `config` does not describe it: it could not be opened again.
    """
    # Built on meta: on a real device transformers would draw every weight anew.
    with torch.device("meta"):
        model = IsoPruneForImageClassification(config)
    built = {key: tensor.shape for key, tensor in model.model.state_dict().items()}
    if built != {key: tensor.shape for key, tensor in module.state_dict().items()}:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} cannot be rebuilt from its name and arguments alone"
        )
    model.model = module
    return model.eval()


def label_fields(names: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """Give the two label maps of a config."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def one_line(error: Exception) -> str:
    """Give the message of a library's error without its line breaks."""
    return " ".join(str(error).split())[:300]


def not_opened(name: str, error: Exception) -> RecipeError:
    """Give the error for weights or a config that cannot be read: out of reach on the Hub, or damaged in a folder."""
    if os.path.isdir(name):
        return RecipeError(
            f"model: the weights or config in {name} cannot be opened: {one_line(error)}; "
            "to draw random weights, give --prune.pretrained false"
        )
    return RecipeError(
        f"model: the weights or config of {name!r} are not on this machine and could not be fetched "
        f"({type(error).__name__}); check the name and the network, or draw random weights with "
        "--prune.pretrained false"
    )
