"""Find out what a name means, open it, and give it the head that is wanted."""

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from isoprune_hf.checkpoint.dense import MAX_CONFIG_NUMBER
from isoprune_hf.checkpoint.difference import run_once
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import is_cut, meta_copy
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models.base import BaseModel, draw, label_fields, not_opened, one_line, wrap
from isoprune_hf.models.from_timm import is_encoder, open_saved_timm, open_timm
from isoprune_hf.models.from_torchvision import open_torchvision
from isoprune_hf.models.from_transformers import open_transformers
from isoprune_hf.models.processors import saved_processor, try_processor


def load_base(
    name: str,
    pretrained: bool = True,
    *,
    model_args: dict[str, Any] | None = None,
    num_labels: int | None = None,
    label_names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> BaseModel:
    """Open a base model.

    Args:
        name: `timm/NAME` or a bare timm name, `torchvision/NAME`, a transformers or timm Hub id, or a local folder:
            one of ours, of transformers, or of timm.
        pretrained: Load trained weights; false draws weights from `seed` and needs no network for timm, torchvision
            and folders.
        model_args: Arguments of a timm or torchvision architecture without trained weights, as {"img_size": 64}.
        num_labels: Size of a new head, drawn from `seed`; None keeps the base's own.
        label_names: Names for the labels of a new head.
        seed: Seed of drawn weights; the caller's random state is left alone.

    Returns:
        The model in eval mode, and its image processor.

    Raises:
        RecipeError: The name is unknown, of another task, or needs a network that is not there.
    """
    name = _checked_name(name)
    model_args = {} if model_args is None else model_args
    _check_options(model_args, num_labels, label_names, seed)
    source = {"name": name, "pretrained": pretrained, "seed": seed, "model_args": model_args}
    if _is_registered(name):
        library, _, short = name.rpartition("/")
        if library == "torchvision":
            base = open_torchvision(short, pretrained, model_args, seed)
        elif num_labels is not None and is_encoder(short):
            base = open_timm(short, pretrained, model_args, seed, _labels(num_labels, label_names))
            source["num_labels"] = num_labels
        else:
            base = open_timm(short, pretrained, model_args, seed)
    else:
        if model_args:
            raise RecipeError(f"prune.model_args is for names of timm and torchvision, and {name} is saved as it is")
        base = _open_saved(name, pretrained, seed)
    if base.model.config.source is None:
        base.model.config.source = source
    _check_pixels(name, base)
    return _with_head(base, True, num_labels, label_names, seed)


def _checked_name(name: str) -> str:
    text = str(name).strip() if isinstance(name, str | Path) else ""
    if not text or not text.isprintable():
        raise RecipeError(f"model: {name!r:.99} is no name; give timm/NAME, torchvision/NAME, a Hub id or a folder")
    return text


def _check_options(model_args: Any, num_labels: Any, label_names: Any, seed: Any) -> None:
    if not isinstance(model_args, dict) or not all(isinstance(key, str) for key in model_args):
        raise RecipeError(f'prune.model_args must be a mapping, as {{"img_size": 64}}, got {model_args!r:.99}')
    if "num_classes" in model_args:
        raise RecipeError("prune.model_args: num_classes is not among them; give --prune.num_labels")
    if num_labels is not None and not (type(num_labels) is int and 1 <= num_labels <= MAX_CONFIG_NUMBER):
        raise RecipeError(f"prune.num_labels must be an integer from 1 to {MAX_CONFIG_NUMBER}, got {num_labels!r:.99}")
    if isinstance(label_names, str) or not all(isinstance(label, str) for label in label_names or ()):
        raise RecipeError(f"label_names must be a sequence of strings, got {label_names!r:.99}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise RecipeError(f"prune.seed must be an integer from 0 to 2^63 - 1, got {seed!r:.99}")


def _is_registered(name: str) -> bool:
    """Whether a name is of the registries of timm and torchvision: neither a folder nor a Hub id."""
    if os.path.isdir(os.path.expanduser(name)):
        return False
    if os.path.isfile(os.path.expanduser(name)):
        raise RecipeError(f"model: {name} is a file; `isoprune convert {name}` makes a folder of an old checkpoint")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise RecipeError(f"model: there is no folder {name!r:.99}")
    if "/" not in name or name.startswith(("timm/", "torchvision/")):
        return True
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise RecipeError(f"model: {name!r:.99} is no folder, and no Hub id of the form owner/name")
    return False


def _open_saved(name: str, pretrained: bool, seed: int) -> BaseModel:
    folder = os.path.expanduser(name)
    local = os.path.isdir(folder)
    place = folder if local else name
    config = _folder_config(Path(folder)) if local else _hub_config(name)
    kind = config.get("model_type", "timm_wrapper" if "architecture" in config else None)
    if kind == "isoprune":
        return _open_ours(place, pretrained, seed)
    if kind == "timm_wrapper":
        return open_saved_timm(place, config, pretrained, seed)
    return open_transformers(place, pretrained, seed)


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, RecursionError, ValueError) as error:
        raise RecipeError(f"model: {folder} holds no readable config.json") from error
    if not isinstance(config, dict):
        raise RecipeError(f"model: {folder}/config.json is no configuration")
    return config


def _hub_config(name: str) -> dict[str, Any]:
    try:
        return PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise not_opened(name, error) from error


def _open_ours(name: str, pretrained: bool, seed: int) -> BaseModel:
    try:
        model = IsoPruneForImageClassification.from_pretrained(name)
    except OSError as error:
        raise RecipeError(f"model: {name} cannot be opened: {one_line(error)}") from error
    model.config.source = model.config.source or {}  # its own: not this folder
    base = BaseModel(model, saved_processor(name))
    if pretrained:
        return base
    if is_cut(model.config):
        raise RecipeError(f"model: {name} is pruned already; drawn weights need a dense base")
    names = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
    return _with_head(base, False, len(names), names, seed)


def _check_pixels(name: str, base: BaseModel) -> None:
    size = try_processor(name, base.processor)
    if size != base.model.config.image_size:  # a model of convolutions takes others, too
        try:
            run_once(meta_copy(base.model).model, size)
        except CheckpointError as error:
            raise RecipeError(f"model: the image processor of {name} does not fit the model: {error}") from error


def _with_head(
    base: BaseModel, pretrained: bool, num_labels: int | None, label_names: tuple[str, ...] | None, seed: int
) -> BaseModel:
    """Give the base a new head, and new weights everywhere when not `pretrained`; all that fits is kept."""
    model = base.model
    if num_labels is None or (num_labels == model.config.num_labels and pretrained):
        return base
    if is_cut(model.config):
        raise RecipeError(
            f"prune.num_labels: the model is pruned already and keeps its {model.config.num_labels} labels"
        )
    labels = _labels(num_labels, label_names)
    drawn = {"pretrained": False, "seed": seed}
    config = IsoPruneConfig(
        base=model.config.base,
        source={**(model.config.source or {}), "num_labels": num_labels, **({} if pretrained else drawn)},
        image_size=model.config.image_size,
        **label_fields(labels),
    )
    module = draw(config, seed)
    if pretrained:
        fitting, new = model.model.state_dict(), module.state_dict()
        for name in [name for name, tensor in fitting.items() if name not in new or new[name].shape != tensor.shape]:
            del fitting[name]  # in place: torchvision's MNASNet loads nothing without the versions that it carries
        module.load_state_dict(fitting, strict=False)
    return BaseModel(wrap(config, module), base.processor)


def _labels(num_labels: int, label_names: tuple[str, ...] | None) -> tuple[str, ...]:
    if label_names is not None and len(label_names) != num_labels:
        raise RecipeError(f"prune.num_labels is {num_labels}, but {len(label_names)} names were given")
    return tuple(label_names or (f"LABEL_{index}" for index in range(num_labels)))
