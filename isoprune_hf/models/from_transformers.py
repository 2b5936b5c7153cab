"""Open a network of transformers from a folder or the Hub."""

from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, build_base, build_limited
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.nested_config import check_config, entries_of
from isoprune_hf.checkpoint.stock import ENTRY, entry_fields
from isoprune_hf.checkpoint.task_forms import (
    IMAGE_CLASSIFICATION,
    IMAGE_FEATURE_EXTRACTION,
    TASK_FORMS,
    TaskForm,
    networks_of,
    task_entry,
)
from isoprune_hf.errors import RecipeError, UnsupportedArchitectureError
from isoprune_hf.models.base import (
    OTHER_TASK,
    BaseModel,
    default_labels,
    draw_base,
    label_fields,
    single_line,
    unreadable,
    without_head,
    wrap_module,
)
from isoprune_hf.models.head import with_new_head
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions
from isoprune_hf.models.processors import transformers_image_size, transformers_processor

_PRETRAINING = ("ForMaskedImageModeling", "ForPreTraining")  # ends of names; no mapping of transformers has them all
_POOLER = "pooler"  # the module of an encoder that computes its `pooler_output`, which its classes may be without


def open_transformers(source: BaseSource, options: LoadOptions) -> BaseModel:
    """Open a folder that transformers wrote, or a Hub id.

    Raises:
        RecipeError: The model is of another task, its weights do not fit or could not be fetched, or it has no head
            and none is asked for.
        CheckpointError: The image processor cannot be opened.
        UnsupportedArchitectureError: The model reads tokens.
    """
    form = _form_of(source, options)
    options.check_task(source.place, form)
    _check_source(source, form)
    config = _read_config(source)
    processor = transformers_processor(source, config)
    described: dict[str, Any] = {"problem_type": config.problem_type, **label_fields(_label_names(source, config))}
    values = config.to_diff_dict() | {"model_type": config.model_type}
    # A stock model with a uniform layout has an entry of isoprune_hf in its config.
    fields = entry_fields(values.pop(ENTRY, None))
    outer = IsoPruneConfig(
        base={"library": "transformers", "config": values, **task_entry(form)},
        image_size=transformers_image_size(config, processor),
        **(described if form.names_classes else {}),
        **fields,
    )
    with torch.device("meta"):  # refuses an oversized model before memory is allocated
        build_base(outer)
    if options.pretrained:
        read, missing = _read_model(source, config, form)
        if missing and form is IMAGE_FEATURE_EXTRACTION:
            missing -= _leave_out_pooler(read, missing)
        if missing and not form.has_classes:
            raise RecipeError(
                f"model: {source.place} has no trained weights for {min(missing)}, by which {type(read).__name__} "
                "computes its outputs; save it with all of its weights"
            )
        if missing:
            _check_missing(source, read, missing, options)
            return with_new_head(BaseModel(wrap_module(outer, read), processor), source, options, missing)
        module: torch.nn.Module = read
    elif fields:
        raise RecipeError(f"model: {source.place} is pruned; random weights need a dense base")
    else:
        module = draw_base(outer, options.seed)
    return BaseModel(wrap_module(outer, module), processor)


def _read_config(source: BaseSource) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.place, revision=source.revision or "main", trust_remote_code=False
        )
    except (OSError, *LIBRARY_ERRORS) as error:
        if source.kind == "folder":
            raise RecipeError(
                f"model: {source.place} is not a folder of isoprune, transformers or timm: {single_line(error)}"
            ) from error
        raise unreadable(source.place, error) from error
    return config


def _form_of(source: BaseSource, options: LoadOptions) -> TaskForm:
    """Return the task of the class that a config names; an encoder that gets a head is a classifier."""
    kind, named = source.config.get("model_type"), source.config.get("architectures")
    if not isinstance(kind, str) or not isinstance(named, list) or kind not in CONFIG_MAPPING:
        return IMAGE_CLASSIFICATION
    for form in TASK_FORMS.values():
        found = [one for one in networks_of(form, CONFIG_MAPPING[kind]) if one.__name__ in named[:1]]
        if found and (form.reads_texts or getattr(found[0], "main_input_name", None) == "pixel_values"):
            is_tower = form is IMAGE_FEATURE_EXTRACTION or form.reads_texts  # which may get a head
            return IMAGE_CLASSIFICATION if is_tower and not options.takes_as_is(form) else form
    # A network with the head of a pretraining without labels is opened as its encoder.
    is_pretrained = any(str(name).endswith(_PRETRAINING) for name in named[:1])
    encoders = networks_of(IMAGE_FEATURE_EXTRACTION, CONFIG_MAPPING[kind]) if is_pretrained else ()
    takes_images = any(getattr(one, "main_input_name", None) == "pixel_values" for one in encoders)
    takes_it = takes_images and options.takes_as_is(IMAGE_FEATURE_EXTRACTION)
    return IMAGE_FEATURE_EXTRACTION if takes_it else IMAGE_CLASSIFICATION


def _check_source(source: BaseSource, form: TaskForm) -> None:
    """Check a config.json before a class of transformers reads it, which may fetch what it names.

    Raises:
        RecipeError: It has no model_type, or that of another task, or names a kernel of attention.
        CheckpointError: An entry is not plain or would be fetched, see `check_config`.
        UnsupportedArchitectureError: The model reads tokens.
    """
    values = {name: value for name, value in source.config.items() if name != ENTRY}
    kind, named = values.get("model_type"), values.get("architectures")
    if not isinstance(kind, str):
        raise RecipeError(f"model: {source.place}/config.json has no model_type")
    first = str((named or [""])[0])
    if form is IMAGE_FEATURE_EXTRACTION and first.endswith("Backbone"):
        raise RecipeError(
            f"model: {source.place} is a {first}, whose feature maps no pipeline takes; prune it in Python, or "
            "name the encoder in architectures of its config.json"
        )
    for name, value in values.items():
        for key, text in entries_of(name, value):
            if "implementation" in f"{name} {key}" and isinstance(text, str) and not text.isidentifier():
                raise RecipeError(f"model: {source.place}/config.json: {name}={value!r:.99} names a kernel to fetch")
    if kind in CONFIG_MAPPING:  # others are refused by transformers
        if form.has_classes:
            _check_task(source, CONFIG_MAPPING[kind])
        check_config(CONFIG_MAPPING[kind], values)


def _check_task(source: BaseSource, kind: type[PreTrainedConfig]) -> None:
    if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise RecipeError(f"model: {source.place} is of type {kind.model_type}, {OTHER_TASK}")
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[kind]
    first = classes[0] if isinstance(classes, tuple) else classes
    if first is not None and first.main_input_name == "input_ids":
        raise UnsupportedArchitectureError(
            f"{first.__name__} reads tokens (input_ids); only classifiers that take images are supported"
        )


def _label_names(source: BaseSource, config: PreTrainedConfig) -> list[str]:
    labels = config.id2label or dict(enumerate(default_labels(config.num_labels or 0)))
    named = {int(index): name for index, name in labels.items()}
    if set(named) != set(range(len(named))):
        raise RecipeError(f"model: {source.place}/config.json: id2label must name the classes 0 to {len(named) - 1}")
    return [named[index] for index in range(len(named))]


def _read_model(
    source: BaseSource, config: PreTrainedConfig, form: TaskForm
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Read the model, and return it with the names of the tensors that the file does not contain."""
    named: dict[str, Any] = {one.__name__: one for one in networks_of(form, type(config))}
    kind = named.get((config.architectures or [""])[0], getattr(transformers, form.auto_class))
    try:
        with torch.random.fork_rng():  # transformers draws the missing ones
            loaded = kind.from_pretrained(
                source.place,
                revision=source.revision or "main",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, *LIBRARY_ERRORS) as error:
        raise unreadable(source.place, error) from error
    module, info = loaded
    return module, frozenset(info["missing_keys"])


def _leave_out_pooler(encoder: PreTrainedModel, missing: frozenset[str]) -> frozenset[str]:
    """Remove a pooler without trained weights from an encoder, in place, and return the names of its tensors.

    Published encoders often have none: it was trained for a head that they were published without.
    """
    pooler = getattr(encoder, _POOLER, None)
    names = {f"{_POOLER}.{name}" for name in pooler.state_dict()} if isinstance(pooler, torch.nn.Module) else set()
    if not names or not names <= missing:
        return frozenset()
    encoder._modules[_POOLER] = None
    return frozenset(names)


def _check_missing(source: BaseSource, module: PreTrainedModel, missing: frozenset[str], options: LoadOptions) -> None:
    """Check that the tensors that a file does not contain are a whole head, and that a new head is asked for."""
    encoder = _encoder_tensors(module)
    if missing != module.state_dict().keys() - encoder:
        lost = min(missing & encoder or missing)
        raise RecipeError(f"model: {source.place} has no trained weights for {lost}: it is {OTHER_TASK}")
    if options.num_labels is None:
        raise without_head(source.place)


def _encoder_tensors(module: PreTrainedModel) -> set[str]:
    """Return the names of the tensors of the encoder in a classifier; all names if there is no class for it."""
    config = module.config
    if type(config) not in MODEL_MAPPING:
        return set(module.state_dict())
    with torch.device("meta"):
        encoder = build_limited("the encoder cannot be built", lambda: AutoModel.from_config(config))  # type: ignore[no-untyped-call]  # untyped in transformers
    prefix = "" if module.base_model is module else f"{module.base_model_prefix}."
    return {f"{prefix}{name}" for name in encoder.state_dict()}
