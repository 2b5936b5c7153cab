# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""How the models of a folder are opened and saved (part of the shipped file): `IsoPrunePreTrainedModel`.

`code_that_ships` returns the file that is saved next to the weights: the modules of `PARTS`, concatenated. These
modules therefore depend on no other module of the package, and contain everything that loading needs. It is a single
file because transformers, loading config and model from two files of a local folder, would create two distinct
config classes.

Private names of transformers that are used here and in no other module (as of 5.24): `_finalize_model_loading`,
`_hf_peft_config_loaded`, `_init_weights`, `_is_hf_initialized`, `_load_pretrained_model`,
`_set_gradient_checkpointing`, `_supports_sdpa`, `_supports_flash_attn`, `_supports_flex_attn`, `_tied_weights_keys`.
"""

import copy
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from isoprune_hf.checkpoint.dense import IsoPruneConfig, describe_error
from isoprune_hf.checkpoint.difference import build_pruned, keep_cut_buffers, named_tensors, run_once
from isoprune_hf.checkpoint.meta import move_to_meta, unsaved_buffers
from isoprune_hf.checkpoint.own_network import Builder, allow_builder, inputs_of
from isoprune_hf.checkpoint.plain_values import require
from isoprune_hf.checkpoint.rebuild import settle_config
from isoprune_hf.checkpoint.task_forms import TASK_FORMS, task_of
from isoprune_hf.checkpoint.transfer import find_class_dims
from isoprune_hf.errors import CheckpointError

_ALIGNMENT_BYTES = 64  # alignment of torch's own allocations
_PACKAGE = "isoprune_hf"
# Paths inside the package, in the order of their imports.
_VALUES = ("needed", "building", "meta", "plain_values", "own_network", "nested_config", "image_pass", "task_forms")
_BASES = ("settings", "dense", "transfer", "difference")
_MODELS = ("image_processor", "outputs", "rebuild", "pretrained", "backbone", "modeling_isoprune")
PROCESSOR_PARTS = ("errors.py", "limits.py", "checkpoint/image_processor.py")  # without torch
PARTS = ("errors.py", "limits.py", *(f"checkpoint/{name}.py" for name in (*_VALUES, *_BASES, *_MODELS)))
# Auto classes of transformers -> the classes that they open a folder with. IsoImageProcessor is used unless
# preprocessor_config.json names another type.
AUTO_CLASSES = {
    "AutoBackbone": "IsoPruneBackbone",
    "AutoConfig": "IsoPruneConfig",
    "AutoImageProcessor": "IsoImageProcessor",
    **{form.auto_class: form.model_class for form in TASK_FORMS.values()},
}
# Names of safetensors for data types -> names of torch; all floating-point types may be cast to one another.
_DTYPE_NAMES = {
    **dict.fromkeys(("F64", "F32", "F16", "BF16"), "floats"),
    "C64": "torch.complex64",
    "I64": "torch.int64",
    "BOOL": "torch.bool",
}


class IsoPrunePreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # untyped in transformers
    """The architecture `config.base`, changed by `config.structure`, as `model`."""

    config: IsoPruneConfig
    config_class = IsoPruneConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # transformers itself assigns tuples
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    # A base of transformers refuses what it does not support itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: IsoPruneConfig, builder: Builder | None = None):
        if builder is not None:
            allow_builder((config.base or {}).get("architecture"), builder)
        super().__init__(config)
        self.model = build_pruned(config)
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            # The base has initialised its own weights; without the mark transformers would initialise them again.
            for module in self.modules():
                vars(module)["_is_hf_initialized"] = True
        self.post_init()  # type: ignore[no-untyped-call]  # untyped in transformers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]  # untyped in transformers
        # Index tables and masks of timm that are not in the file; if any of a module was cut, all of them are in it.
        init_buffers = getattr(module, "init_non_persistent_buffers", None)
        if init_buffers is not None and module._non_persistent_buffers_set:
            init_buffers()

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that embeds the image: that of the base's class, or the first layer if there is none."""
        if isinstance(self.model, PreTrainedModel):
            with suppress(NotImplementedError):  # ResNet's
                return self.model.get_input_embeddings()
        return next(module for module in self.model.modules() if isinstance(module, nn.Conv2d | nn.Linear))

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        set_in_timm = getattr(self.model, "set_grad_checkpointing", None)
        try:
            if set_in_timm is not None:
                set_in_timm(enable)
            elif isinstance(self.model, PreTrainedModel) and self.model.supports_gradient_checkpointing:
                super()._set_gradient_checkpointing(enable, *args, **kwargs)
            elif enable:
                raise ValueError(f"{type(self.model).__name__} has no gradient checkpointing")
        except AssertionError as error:  # timm's answer
            raise ValueError(f"{type(self.model).__name__} has no gradient checkpointing ({error})") from error

    @property
    def _tied_weights_keys(self) -> dict[str, str]:  # type: ignore[override]  # transformers only reads it
        """Each further name of a shared tensor -> its first name, which is the one that is saved."""
        first: dict[int, str] = {}
        named = {f"model.{name}": tensor for name, tensor in named_tensors(self.model).items()}
        return {name: found for name, t in named.items() if (found := first.setdefault(id(t), name)) != name}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return the names that transformers ties after loading: all tensors that the base shares."""
        return self._tied_weights_keys

    @property
    def _has_other_weights(self) -> bool:
        """Return whether a quantizer or an adapter of PEFT has replaced layers, and decides what is saved."""
        return vars(self).get("hf_quantizer") is not None or self._hf_peft_config_loaded

    def _cast(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cast images to the type of the weights."""
        # A replica of DataParallel has its parameters elsewhere.
        tables = (getattr(module, "_former_parameters", module._parameters) for module in self.model.modules())
        parameters = (parameter for table in tables for parameter in table.values() if parameter is not None)
        dtype = next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), None)
        return pixel_values.to(dtype)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # accepts all keywords of transformers
        cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model like `PreTrainedModel.from_pretrained`, but only from safetensors and only if it fits.

        A network of no library needs `builder`: the class or function that it was saved with.

        Raises:
            CheckpointError: An entry of the config or a tensor of the file does not fit, or the model does not run.
        """
        kwargs["use_safetensors"] = True
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        if pretrained_model_name_or_path and folder.is_dir() and not kwargs.get("variant"):
            _check_files(folder)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"model.safetensors: not a readable safetensors file ({error})") from error

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        # The last point at which the model is on meta and no memory has been allocated.
        _check_tensors(model, state_dict, checkpoint_files or [], any_classes=load_config.ignore_mismatched_sizes)
        # A dense base that does not run is not refused, and tensors that are in memory do not come from a file.
        if any((model.config.structure or {}).values()) and checkpoint_files:
            with torch.device("meta"):
                network = move_to_meta(copy.deepcopy(model.model)).float().eval()
                run_once(network, inputs_of(model.config.base, model.config.image_size))
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        align_tensors(model)
        return loaded

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        # transformers leaves the buffers that are not in the file empty; their values are those of the constructor.
        computed = [found for found in unsaved_buffers(model) if not found[2].is_meta]
        info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        for owner, name, buffer in computed:
            owner._buffers[name] = buffer.to(getattr(owner, name).device)
        return info

    def save_pretrained(  # type: ignore[override]  # accepts all keywords of transformers
        self, save_directory: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        """Save config, weights and the shipped file: the folder opens with and without isoprune_hf.

        Raises:
            CheckpointError: The folder would answer differently from the model, see `settle_config`; not checked for
                a given `state_dict`, quantized weights and adapters.
        """
        # Tensors keep the names of their modules: the structure refers to them, and loading compares them.
        kwargs["save_original_format"] = False
        self.config.auto_map = auto_map_of(self.config)
        keep_cut_buffers(self.model, self.config.structure)
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        given_state = args[1] if len(args) > 1 else kwargs.get("state_dict")
        if is_main_process and given_state is None and not self._has_other_weights:
            settle_config(self, self.config)
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / "modeling_isoprune.py"
        if is_main_process and target.resolve() != Path(__file__).resolve():
            target.write_text(code_that_ships(), encoding="utf-8", newline="\n")


def auto_map_of(config: IsoPruneConfig) -> dict[str, str]:
    """Return Auto class -> class in the shipped file, of those that open a folder of the config's task."""
    form = task_of(config.base)
    others = {other.auto_class for other in TASK_FORMS.values() if other is not form} - {"AutoModel"}
    return {auto: f"modeling_isoprune.{name}" for auto, name in AUTO_CLASSES.items() if auto not in others}


def align_tensors(network: nn.Module) -> None:
    """Move the tensors of a mapped file, which have any address, in place: kernels round differently on such data."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def code_that_ships(parts: Sequence[str] = PARTS) -> str:
    """Return the source of the file that is saved next to the weights: the modules of `parts`, concatenated."""
    here = Path(__file__)
    if __name__ != f"{_PACKAGE}.checkpoint.pretrained":  # running as the shipped file itself
        return here.read_text(encoding="utf-8")
    own_imports = re.compile(rf"^from {_PACKAGE}\.[\w.]+ import (\([^)]*\)|.*)\n", re.MULTILINE)
    return "\n\n".join(own_imports.sub("", (here.parents[1] / name).read_text(encoding="utf-8")) for name in parts)


def _check_files(folder: Path) -> None:
    """Check that the weights, whole or in shards, are files inside the folder."""
    index = folder / "model.safetensors.index.json"
    names: list[Any] = ["model.safetensors"]
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            values = json.loads(index.read_text(encoding="utf-8"))
            names = [*values["weight_map"].values()] if isinstance(values["metadata"], dict) else [None]
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:  # any JSON but an index
            raise CheckpointError(f"{index.name}: not a readable index ({describe_error(error)})") from error
    for name in names:
        inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
        require(
            inside and (folder / name).is_file(),
            f"{name!r}: no such file in {folder}; weights must be in the folder itself",
        )


# Shape and kind of a tensor.
_Form = tuple[list[int], str]


def _check_tensors(
    model: IsoPrunePreTrainedModel, state_dict: dict[str, torch.Tensor] | None, files: list[str], *, any_classes: bool
) -> None:
    """Compare names, shapes and kinds of the stored tensors with those of the model.

    With `any_classes`, the dimensions that count classes may differ.
    """
    found = {name: _form_of(tensor) for name, tensor in (state_dict or {}).items()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    entry = opened.get_slice(name)
                    dtype = entry.get_dtype()
                    found[name] = [*entry.get_shape()], _DTYPE_NAMES.get(dtype, dtype)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{Path(file).name}: not a readable safetensors file ({error})") from error
    tied = model._tied_weights_keys
    expected = {name: _form_of(tensor) for name, tensor in model.state_dict().items() if name not in tied}
    for name in sorted(expected.keys() | found.keys()):
        have, want = found.get(name), expected.get(name)
        if have == want:
            continue
        differs_in_classes = _differs_in_classes(model.config, name, have, want)
        if any_classes and differs_in_classes:
            continue
        hint = "; ignore_mismatched_sizes=True opens it with other classes" if differs_in_classes else ""
        raise CheckpointError(
            f"tensor {name!r}: the checkpoint has {_describe(have)}, the config requires {_describe(want)}{hint}"
        )


def _differs_in_classes(config: IsoPruneConfig, name: str, first: _Form | None, second: _Form | None) -> bool:
    """Return whether two forms of a tensor differ in nothing but the sizes that count classes."""
    if first is None or second is None or first[1] != second[1] or len(first[0]) != len(second[0]):
        return False
    dims = find_class_dims(config).get(name.removeprefix("model."), [False] * len(first[0]))
    return all(counts or a == b for a, b, counts in zip(first[0], second[0], dims, strict=True))


def _form_of(tensor: torch.Tensor) -> _Form:
    return [*tensor.shape], "floats" if tensor.dtype.is_floating_point else str(tensor.dtype)


def _describe(form: _Form | None) -> str:
    return "no such tensor" if form is None else f"{form[0]} of {form[1]}"
