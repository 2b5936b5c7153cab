"""Replace the head of a base model, or all of its weights."""

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.models.base import BaseModel, draw_base, label_fields, wrap_module


def replace_head(base: BaseModel, labels: tuple[str, ...], *, seed: int) -> BaseModel:
    """Return the base with a new head of random weights; all tensors of unchanged shape keep their values.

    Args:
        base: Dense base model; left untouched.
        labels: Label names of the new head.
        seed: Seed of the new weights.
    """
    config = _config_with(base, labels, {})
    module = draw_base(config, seed)
    fitting = base.model.model.state_dict()
    new = module.state_dict()
    for name in [name for name, tensor in fitting.items() if name not in new or new[name].shape != tensor.shape]:
        del fitting[name]  # in place: torchvision's MNASNet reads a version number from the state dict itself
    module.load_state_dict(fitting, strict=False)
    return BaseModel(wrap_module(config, module), base.processor)


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
    return IsoPruneConfig(
        base=old.base,
        source={**(old.source or {}), "num_labels": len(labels), **source},
        image_size=old.image_size,
        **label_fields(labels),
    )
