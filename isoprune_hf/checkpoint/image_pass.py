# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Run a network of images and texts on images alone (part of the shipped file): call `take_images`."""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput


@dataclass
class ImageEmbeds(ModelOutput):
    """The answer to images alone.

    Args:
        image_embeds: Projected features of unit norm, (B, C).
    """

    image_embeds: torch.Tensor | None = None


class ImagePass:
    """Base of the classes that `take_images` makes."""


def take_images(network: nn.Module) -> nn.Module:
    """Make a network with a tower for images and one for texts take images first and alone, in place, and return it.

    Without texts it returns `ImageEmbeds`, and the tower of texts does not run; with them it answers as before. Its
    class becomes a child of its class with the same name, so its tensors and modules keep their names.
    """
    if not isinstance(network, ImagePass):
        kind: Any = type(network)
        network.__class__ = _class_with_image_pass(kind)
    return network


def class_as_made(network: nn.Module) -> type:
    """Return the class of a network, without the pass on images alone."""
    return type(network).__mro__[2] if isinstance(network, ImagePass) else type(network)


@cache
def _class_with_image_pass(kind: Any) -> Any:
    def forward(self: Any, pixel_values: torch.Tensor | None = None, **options: Any) -> Any:
        if options.get("input_ids") is not None:
            return kind.forward(self, pixel_values=pixel_values, **options)
        given = {name: value for name, value in options.items() if value is not None and name != "return_dict"}
        features = self.get_image_features(pixel_values, **given).pooler_output
        return ImageEmbeds(image_embeds=features / features.norm(p=2, dim=-1, keepdim=True))

    own, *others = inspect.signature(kind.forward).parameters.values()
    images = next(found for found in others if found.name == "pixel_values")
    ordered = [own, images, *(found for found in others if found is not images)]
    vars(forward)["__signature__"] = inspect.Signature(ordered)
    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (ImagePass, kind), names)
