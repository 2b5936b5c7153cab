"""Residual blocks that can leave whole: what they put out is what they were given plus what they compute."""

from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, skippable_blocks
from isoprune_hf.pruning.groups import ResidualBlock


def find_blocks(model: IsoPruneForImageClassification) -> tuple[ResidualBlock, ...]:
    """Find the residual blocks of a model that can leave; reads shapes only and leaves the model untouched.

    They are those that loading accepts as removed (`skippable_blocks`), as far as they are still there and have a
    sibling of their class. Stems, patch embeddings, downsampling, classifiers and whole stages are never among them.

    Returns:
        Blocks in the order of `named_modules`; their signature is the name of their class.

    Raises:
        CheckpointError: The model does not run on the meta device.
    """
    modules = dict(model.model.named_modules())
    gone = set((model.config.structure or {}).get("removed") or ())
    return tuple(
        ResidualBlock(
            path,
            type(modules[path]).__name__,
            tuple(f"{path}.{name}" for name, _ in modules[path].named_parameters()),
        )
        for path in skippable_blocks(model.config)
        if path not in gone and _has_sibling(modules[path], modules[path.rpartition(".")[0]])
    )


def _has_sibling(module: nn.Module, parent: nn.Module) -> bool:
    return sum(type(child) is type(module) for child in parent.children()) > 1
