"""Convert a pruned ViT or DeiT with equal blocks to a stock model of transformers: call `to_stock`."""

import copy

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.errors import RecipeError, UnsupportedArchitectureError
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.cutting.stock_sizes import StockModel
from isoprune_hf.pruning.cutting.stock_timm import convert_timm, find_unsupported_part, is_timm_vit
from isoprune_hf.pruning.cutting.stock_transformers import convert_transformers, is_stock_vit

_MAX_LOGIT_DIFFERENCE = 1e-5  # relative to the largest logit
_NUM_IMAGES = 2
# Entries of the config that a stock model takes over from the cut model.
_COPIED_ENTRIES = ("source", "cost", "recipe", "stage", "image_size", "id2label", "problem_type")


def check_family(model: IsoPruneForImageClassification) -> None:
    """Check, without reading weights, that a model with equal blocks can be converted to one of transformers.

    Raises:
        RecipeError: It cannot; the message names the part that has no counterpart.
    """
    network = model.model
    name = type(network).__name__
    if is_timm_vit(network):
        part = find_unsupported_part(network)
        if part is not None:
            raise RecipeError(
                f"prune.layout uniform: this {name} has {part}, which ViT and DeiT of transformers do not have; set "
                "prune.layout: per-layer"
            )
    elif not is_stock_vit(network):
        raise RecipeError(
            f"prune.layout uniform is for ViT and DeiT of timm and of transformers, and this is a {name}; set "
            "prune.layout: per-layer"
        )


def to_stock(
    pruned: IsoPruneForImageClassification, images: torch.Tensor | None = None
) -> IsoPruneForImageClassification:
    """Convert a cut ViT or DeiT with equal blocks to the equivalent stock model of transformers.

    A fused projection of queries, keys and values becomes three, layer scale is multiplied into the weights before it,
    and removed blocks are dropped from the list.

    Args:
        pruned: The cut model; left untouched.
        images: Images (B, C, H, W) on which both models must agree; random ones by default.

    Returns:
        A wrapper around the stock model without a structure, since its config names the sizes. Cost, source, recipe
        and stage are those of `pruned`.

    Raises:
        RecipeError: The model belongs to another family.
        CheckpointError: The blocks have different sizes.
        UnsupportedArchitectureError: The logits differ by more than 1e-5 of the largest.
    """
    check_family(pruned)
    converted = _convert(pruned)
    config = converted.config
    outer = IsoPruneConfig(
        base={"library": "transformers", "config": config.to_diff_dict() | {"model_type": config.model_type}},
        layout="uniform",
        **{name: copy.deepcopy(getattr(pruned.config, name)) for name in _COPIED_ENTRIES},
    )
    named = {f"model.{name}": tensor.detach().clone() for name, tensor in converted.state.items()}
    stock: IsoPruneForImageClassification = IsoPruneForImageClassification.from_pretrained(
        None, config=outer, state_dict=named, dtype=pruned.dtype
    )
    stock.to(pruned.device)  # type: ignore[arg-type]  # transformers wraps `to` and loses its signature
    stock.train(mode=False)
    _check_logits(pruned, stock, images)
    if stock.config.cost is not None:  # the parameters of layer scale are gone
        stock.config.cost = {**stock.config.cost, "pruned": count_cost(stock).to_dict()}
    stock.train(pruned.training)
    return stock


def _convert(pruned: IsoPruneForImageClassification) -> StockModel:
    network = pruned.model
    if is_timm_vit(network):
        return convert_timm(network)
    if is_stock_vit(network):
        return convert_transformers(network)
    raise RecipeError(f"prune.layout uniform cannot convert a {type(network).__name__}")


def _check_logits(
    pruned: IsoPruneForImageClassification, stock: IsoPruneForImageClassification, images: torch.Tensor | None
) -> None:
    """Check that both models give the same logits.

    Raises:
        UnsupportedArchitectureError: They do not.
    """
    if images is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(_NUM_IMAGES, *image_size_of(pruned), generator=generator)
    images = images[:_NUM_IMAGES].to(pruned.device)
    was_training = pruned.training
    pruned.train(mode=False)
    with torch.no_grad():
        expected, found = pruned(images).logits.float(), stock(images).logits.float()
    pruned.train(was_training)
    difference = ((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    if not difference <= _MAX_LOGIT_DIFFERENCE:  # nan included
        raise UnsupportedArchitectureError(
            f"prune.layout uniform: {type(stock.model).__name__} returns logits that differ by {difference:.1e} of "
            f"the largest, more than {_MAX_LOGIT_DIFFERENCE:.0e}; set prune.layout: per-layer"
        )
