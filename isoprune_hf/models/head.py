"""Replace the head of a base model, or all of its weights."""

import copy
import logging
from collections.abc import Collection

import torch

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.structure import is_cut
from isoprune_hf.models.base import BaseModel, draw_base, label_fields, wrap_module
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions, describe_source
from isoprune_hf.models.stored_type import default_type
from isoprune_hf.recipes.values import ProblemType

logger = logging.getLogger(__name__)


def replace_head(
    base: BaseModel,
    labels: tuple[str, ...],
    *,
    seed: int,
    untrained: Collection[str] = (),
    problem: ProblemType | None = None,
) -> BaseModel:
    """Return the base with a new head of random weights, in its type; tensors of unchanged shape keep their values.

    Args:
        base: Dense or pruned model; left untouched.
        labels: Label names of the new head.
        seed: Seed of the new weights.
        untrained: Tensors that are drawn anew although their shapes stay.
        problem: Problem type of the new head.
    """
    config = _config_with(base, labels, {})
    config.problem_type = problem
    with default_type(base.model.dtype):
        module = draw_base(config, seed)
    fitting = base.model.model.state_dict()
    new = module.state_dict()

    def is_kept(name: str, tensor: torch.Tensor) -> bool:
        return name in new and name not in untrained and new[name].shape == tensor.shape

    for name in [name for name, tensor in fitting.items() if not is_kept(name, tensor)]:
        del fitting[name]  # in place: torchvision's MNASNet reads a version number from the state dict itself
    module.load_state_dict(fitting, strict=False)
    return BaseModel(wrap_module(config, module), base.processor)


def with_new_head(
    encoder: BaseModel, source: BaseSource, options: LoadOptions, untrained: Collection[str] = ()
) -> BaseModel:
    """Return an encoder with the head that is asked for, and record its source.

    Args:
        encoder: The encoder; its config is changed in place.
        source: Origin of the encoder.
        options: Number of labels, their names, and the seed.
        untrained: Tensors of a head that no file contains; empty if the head is already the one that is asked for.
    """
    count = options.num_labels or 0
    encoder.model.config.source = {**describe_source(source, options), "num_labels": count}
    base = encoder
    if untrained:
        labels, problem = options.head_labels(count), encoder.model.config.problem_type
        base = replace_head(encoder, labels, seed=options.seed, untrained=untrained, problem=problem)
    if options.pretrained:
        log_new_head(base)
    return base


def log_new_head(base: BaseModel) -> None:
    """Log that the head of a base with trained weights is new."""
    config = base.model.config
    logger.warning(
        f"{(config.source or {}).get('name')}: the head for {config.num_labels} labels is new and untrained, and the "
        "criteria of the presets score by its outputs: train it before pruning, or score by the features alone with "
        "--prune.criterion activation_variance --prune.reconstruct least_squares, and finetune afterwards"
    )


def redraw_weights(base: BaseModel, labels: tuple[str, ...], *, seed: int) -> BaseModel:
    """Return the base with all weights drawn from `seed`.

    Args:
        base: Dense base model; left untouched.
        labels: Label names of the head.
        seed: Seed of the weights.
    """
    config = _config_with(base, labels, {"pretrained": False, "seed": seed})
    return BaseModel(wrap_module(config, draw_base(config, seed)), base.processor)


def _config_with(base: BaseModel, labels: tuple[str, ...], source: dict[str, bool | int]) -> IsoPruneConfig:
    old = base.model.config
    if is_cut(old):  # its source stays the dense base, with the head of that
        config = copy.deepcopy(old)
        config.id2label, config.label2id = label_fields(labels).values()
        return config
    return IsoPruneConfig(
        base=old.base,
        source={**(old.source or {}), "num_labels": len(labels), **source},
        image_size=old.image_size,
        problem_type=old.problem_type,
        format_version=old.format_version,
        **label_fields(labels),
    )
