"""Residual blocks that can be removed whole: `find_blocks`."""

from collections.abc import Mapping

import torch
from torch import nn

from isoprune_hf.checkpoint.difference import skippable_parts
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, SkippedBlock, skippable_blocks
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.graph.copying import copy_shapes
from isoprune_hf.pruning.groups import ResidualBlock


def find_blocks(model: IsoPruneForImageClassification) -> tuple[ResidualBlock, ...]:
    """Find the residual blocks of a model that can be removed; reads shapes only and leaves the model untouched.

    These are the blocks whose output is their input plus a computed term (`skippable_blocks`), that were not removed
    before, and that have a sibling of their class. Stems, patch embeddings, downsampling, classifiers and whole stages
    are never among them.

    Returns:
        Blocks in the order of `named_modules`; their signature is the name of their class.

    Raises:
        CheckpointError: The model does not run on the meta device.
    """
    modules = dict(model.model.named_modules())
    removed = set((model.config.structure or {}).get("removed") or ())
    paths = [path for path in replaceable_blocks(model) if path not in removed]
    return tuple(
        ResidualBlock(
            path,
            type(modules[path]).__name__,
            tuple(f"{path}.{name}" for name, _ in modules[path].named_parameters()),
            any(sibling not in paths for sibling in _siblings(path, modules)),
        )
        for path in paths
        if _siblings(path, modules)
    )


def replaceable_blocks(model: IsoPruneForImageClassification) -> dict[str, SkippedBlock]:
    """Return the blocks of the dense base that may be removed, each with its replacement; see `skippable_blocks`."""
    if model.config.base is not None:
        return skippable_blocks(model.config)
    with torch.inference_mode(False):  # a module that no config describes
        copied = copy_shapes(model.model).eval()
    return skippable_parts(copied, [(None, image_size_of(model))])


def _siblings(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of the other modules of the same class in the parent of a block."""
    parent = path.rpartition(".")[0]
    names = (f"{parent}.{name}" if parent else name for name, _ in modules[parent].named_children())
    return [name for name in names if name != path and type(modules[name]) is type(modules[path])]
