"""Open an image classifier of transformers, from a folder or the Hub."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, build_base
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.stock import ENTRY, entry_fields
from isoprune_hf.errors import CheckpointError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.models.base import OTHER_TASK, BaseModel, draw, label_fields, not_opened, one_line, wrap
from isoprune_hf.models.processors import transformers_image_size, transformers_processor


def open_transformers(name: str, pretrained: bool, seed: int) -> BaseModel:
    """Open a folder that transformers wrote, or a Hub id.

    Raises:
        RecipeError: It is of another task, or the weights do not fit or could not be fetched.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, *LIBRARY_ERRORS) as error:
        if Path(name).is_dir():
            raise RecipeError(
                f"model: {name} is no folder of isoprune, transformers or timm: {one_line(error)}"
            ) from error
        raise not_opened(name, error) from error
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise RecipeError(f"model: {name} is of type {config.model_type}, {OTHER_TASK}")
    _require_pixels(config)
    try:
        processor = transformers_processor(name, config)
        labels = config.id2label or {index: f"LABEL_{index}" for index in range(config.num_labels)}
        names = [labels[index] for index in range(config.num_labels)]
        image_size = transformers_image_size(config, processor)
    except CheckpointError:
        raise  # of the processor
    except LIBRARY_ERRORS as error:
        raise RecipeError(
            f"model: {name}/config.json has no usable labels or image_size: {one_line(error)}"
        ) from error
    values = config.to_diff_dict() | {"model_type": config.model_type}
    ours = entry_fields(values.pop(ENTRY, None))
    base = {"library": "transformers", "config": values}
    outer = IsoPruneConfig(base=base, image_size=image_size, **label_fields(names), **ours)
    if not pretrained and ours:
        raise RecipeError(f"model: {name} is pruned already; drawn weights need a dense base")
    if not pretrained:
        return BaseModel(wrap(outer, draw(outer, seed)), processor)
    with torch.device("meta"):  # refuses what nobody should wait for
        build_base(outer)
    try:
        module, info = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, SafetensorError, *LIBRARY_ERRORS) as error:
        raise not_opened(name, error) from error
    if info["missing_keys"]:
        raise RecipeError(f"model: {name} has no trained {sorted(info['missing_keys'])[0]}: it is {OTHER_TASK}")
    return BaseModel(wrap(outer, module), processor)


def _require_pixels(config: PreTrainedConfig) -> None:
    """Refuse what reads tokens: such a class names them as its main input."""
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    first = classes[0] if isinstance(classes, tuple) else classes
    if first.main_input_name == "input_ids":
        raise UnsupportedArchitectureError(
            f"{first.__name__} reads tokens (input_ids); supported are classifiers that take images alone"
        )
