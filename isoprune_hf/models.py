"""Open a base model, with its image processor, from timm, transformers, torchvision or a folder of ours."""

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from safetensors import SafetensorError
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.models import load_model_config_from_hf
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoPruneConfig,
    IsoPruneForImageClassification,
    build_base,
)
from isoprune_hf.errors import CheckpointError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.processors import (
    timm_processor,
    torchvision_processor,
    transformers_image_size,
    transformers_processor,
)

_TASK = "not an image classifier; give a model with a classification head"


class BaseModel(NamedTuple):
    """A model and the image processor that gives it the pixels it was trained on."""

    model: IsoPruneForImageClassification
    processor: BaseImageProcessor


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
    if "num_classes" in (model_args or {}):
        raise RecipeError("prune.model_args: num_classes is not among them; give --prune.num_labels")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if model_args:
            raise RecipeError(f"prune.model_args is for names of timm and torchvision, and {name} is a folder")
        config = _folder_config(folder)
        if config.get("model_type") == "isoprune":
            base = _open_ours(str(folder))
            if not pretrained and any((base.model.config.structure or {}).values()):
                raise RecipeError(f"model: {name} is pruned already; drawn weights need a dense base")
            if pretrained or num_labels:
                return _with_head(base, pretrained, num_labels, label_names, seed)
            return _with_head(
                base, False, base.model.config.num_labels, tuple(base.model.config.id2label.values()), seed
            )
        is_timm = "architecture" in config and config.get("model_type", "timm_wrapper") == "timm_wrapper"
        source, opener = (f"local-dir:{folder}", _open_timm_folder) if is_timm else (str(folder), _open_transformers)
        base = opener(source, pretrained, seed)
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise RecipeError(f"model: there is no folder {name!r}")
    elif name.startswith("torchvision/"):
        base = _open_torchvision(name.removeprefix("torchvision/"), pretrained, model_args or {}, seed)
    elif timm.is_model(name.removeprefix("timm/")) or "/" not in name:
        base = _open_timm(name.removeprefix("timm/"), pretrained, model_args or {}, seed)
    elif name.startswith("timm/"):
        raise RecipeError(f"model: timm {timm.__version__} has no model {name!r}{_like(name[5:], timm.list_models())}")
    else:
        base = _open_transformers(name, pretrained, seed)
    if not base.model.config.source:  # a Hub model of ours knows its own
        base.model.config.source = {
            "name": name,
            "pretrained": pretrained,
            "seed": seed,
            "model_args": model_args or {},
        }
    return _with_head(base, True, num_labels, label_names, seed)


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"model: {folder} holds no readable config.json") from error
    if not isinstance(config, dict):
        raise RecipeError(f"model: {folder}/config.json is no configuration")
    return config


def _like(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _offline(name: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"model: the weights or config of {name!r} are not on this machine and could not be fetched "
        f"({type(error).__name__}); check the name and the network, or draw random weights with "
        "--prune.pretrained false"
    )


def _draw(config: IsoPruneConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return build_base(config)
        except CheckpointError as error:
            raise RecipeError(f"prune.model or model_args: {error}") from error


def _wrap(config: IsoPruneConfig, module: nn.Module) -> IsoPruneForImageClassification:
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


def _open_ours(name: str) -> BaseModel:
    try:
        model = IsoPruneForImageClassification.from_pretrained(name)
    except OSError as error:
        raise RecipeError(f"model: {name} cannot be opened: {_line(error)}") from error
    return BaseModel(model, AutoImageProcessor.from_pretrained(name))


def _with_head(
    base: BaseModel, pretrained: bool, num_labels: int | None, label_names: tuple[str, ...] | None, seed: int
) -> BaseModel:
    """Give the base a new head, and new weights everywhere when not `pretrained`; all that fits is kept."""
    model = base.model
    if num_labels is None or (num_labels == model.config.num_labels and pretrained):
        return base
    if any((model.config.structure or {}).values()):
        raise RecipeError(
            f"prune.num_labels: the model is pruned already and keeps its {model.config.num_labels} labels"
        )
    if label_names is not None and len(label_names) != num_labels:
        raise RecipeError(f"prune.num_labels is {num_labels}, but {len(label_names)} names were given")
    drawn = {"pretrained": False, "seed": seed}
    config = IsoPruneConfig(
        base=model.config.base,
        source={**(model.config.source or {}), "num_labels": num_labels, **({} if pretrained else drawn)},
        image_size=model.config.image_size,
        **_labels(label_names or tuple(f"LABEL_{index}" for index in range(num_labels))),
    )
    module = _draw(config, seed)
    if pretrained:
        old = model.model.state_dict()
        fitting = {k: old[k] for k, tensor in module.state_dict().items() if k in old and old[k].shape == tensor.shape}
        module.load_state_dict(fitting, strict=False)
    return BaseModel(_wrap(config, module), base.processor)


def _labels(names: tuple[str, ...] | list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _open_timm(name: str, pretrained: bool, model_args: dict[str, Any], seed: int) -> BaseModel:
    if not name.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(name):
        raise RecipeError(f"model: timm {timm.__version__} has no model {name!r}{_like(name, timm.list_models())}")
    if pretrained and model_args:
        raise RecipeError("prune.model_args changes the architecture: it needs --prune.pretrained false")
    try:
        architecture = name
        if name.startswith("hf-hub:"):
            _, architecture, model_args = load_model_config_from_hf(name.removeprefix("hf-hub:"))
        elif name.startswith("local-dir:"):
            saved = _folder_config(Path(name.removeprefix("local-dir:")))
            architecture, model_args = saved["architecture"], saved.get("model_args")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = timm.create_model(name, pretrained=pretrained, **_tuples(model_args or {}))
    except OSError as error:
        raise _offline(name, error) from error
    except (
        RuntimeError,
        TypeError,
        AssertionError,
        ValueError,
        LookupError,
        ArithmeticError,
        SafetensorError,
    ) as error:
        raise RecipeError(f"model: timm cannot build {name!r} with {model_args}: {_line(error)}") from error
    if not module.num_classes:
        raise RecipeError(f"model: {name} is {_TASK}")
    data = resolve_model_data_config(module)
    side = (model_args or {}).get("img_size", data["input_size"][-1])
    size = (side, side) if isinstance(side, int) else tuple(side)
    if size != tuple(data["input_size"][1:]):
        # Of an image size that the trained weights never saw, the whole image is used.
        data |= {"input_size": (data["input_size"][0], *size), "crop_pct": 1.0}
    names = module.pretrained_cfg.get("label_names") or _imagenet_names(module)
    config = IsoPruneConfig(
        base={
            "library": "timm",
            "architecture": architecture,
            "args": {k: v for k, v in (model_args or {}).items() if k != "num_classes"},
        },
        image_size=list(data["input_size"]),
        **_labels(names or [f"LABEL_{index}" for index in range(module.num_classes)]),
    )
    return BaseModel(_wrap(config, module), timm_processor(data))


def _tuples(args: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}


def _imagenet_names(module: nn.Module) -> list[str] | None:
    subset = timm.data.infer_imagenet_subset(module)
    if subset is None or module.num_classes != 1000:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(index, detailed=False) for index in range(module.num_classes)]


def _open_timm_folder(name: str, pretrained: bool, seed: int) -> BaseModel:
    return _open_timm(name, pretrained, {}, seed)


def _open_torchvision(name: str, pretrained: bool, model_args: dict[str, Any], seed: int) -> BaseModel:
    name, _, version = name.partition(".")
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        task = f"{_TASK}" if name in torchvision.models.list_models() else "unknown"
        raise RecipeError(f"model: torchvision/{name} is {task}{_like(name, known)}")
    if pretrained and model_args:
        raise RecipeError("prune.model_args changes the architecture: it needs --prune.pretrained false")
    choices = torchvision.models.get_model_weights(name)
    if version and version not in choices.__members__:
        raise RecipeError(
            f"model: torchvision/{name} has no weights {version!r}; it has {', '.join(choices.__members__)}"
        )
    weights = choices[version] if version else choices.DEFAULT
    transform, categories = weights.transforms(), weights.meta["categories"]
    crop = transform.crop_size[0]
    labels = _labels(categories) if "num_classes" not in model_args else {"num_labels": model_args["num_classes"]}
    base = {"library": "torchvision", "architecture": name, "args": model_args}
    config = IsoPruneConfig(base=base, image_size=[3, crop, crop], **labels)
    try:
        module = (
            torchvision.models.get_model(name, weights=weights, progress=False) if pretrained else _draw(config, seed)
        )
    except OSError as error:
        raise _offline(f"torchvision/{name}", error) from error
    return BaseModel(_wrap(config, module), torchvision_processor(transform))


def _open_transformers(name: str, pretrained: bool, seed: int) -> BaseModel:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise RecipeError(
                f"model: {name} is no folder of isoprune, transformers or timm: {_line(error)}"
            ) from error
        raise _offline(name, error) from error
    if config.model_type == "isoprune":
        return _open_ours(name)
    if config.model_type == "timm_wrapper":
        return _open_timm(f"hf-hub:{name}", pretrained, {}, seed)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise RecipeError(f"model: {name} is of type {config.model_type}, {_TASK}")
    processor = transformers_processor(name, config)
    outer = IsoPruneConfig(
        base={"library": "transformers", "config": config.to_diff_dict() | {"model_type": config.model_type}},
        image_size=transformers_image_size(config, processor),
        **_labels([config.id2label[index] for index in range(config.num_labels)]),
    )
    if not pretrained:
        return BaseModel(_wrap(outer, _draw(outer, seed)), processor)
    try:
        module, info = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _offline(name, error) from error
    if info["missing_keys"]:
        raise RecipeError(f"model: {name} has no trained {sorted(info['missing_keys'])[0]}: it is {_TASK}")
    return BaseModel(_wrap(outer, module), processor)
