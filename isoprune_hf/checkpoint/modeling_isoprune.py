# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""A pruned image classifier: a base architecture plus what differs from it.

What travels with the weights is one file, the modules of `PARTS` in a row: so these use nothing of ours but one
another, and hold all that loading needs. It is one file because config and model in two become two different config
classes when transformers loads them from a local folder.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_backends import PilBackend
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

from isoprune_hf.checkpoint.dense import (
    FORMAT_VERSION,
    IsoPruneConfig,
    build_base,
    cause,
    require,
)
from isoprune_hf.checkpoint.difference import (
    SkippedBlock,
    apply_structure,
    build_pruned,
    check_structure,
    keep_cut_buffers,
    named_tensors,
    run_once,
    skippable_blocks,
)
from isoprune_hf.errors import CheckpointError, ImageError, IsoPruneError

LARGEST_IMAGE = 2**26  # pixels: 8192 x 8192
_ALIGNMENT = 64  # bytes: where torch itself allocates
_PACKAGE = "isoprune_hf"
# Inside the package; `errors.py` first, since the others raise what it defines.
PARTS = ("errors.py", "checkpoint/dense.py", "checkpoint/difference.py", "checkpoint/modeling_isoprune.py")
_DTYPES = {**dict.fromkeys(("F64", "F32", "F16", "BF16"), "floats"), "I64": "torch.int64", "BOOL": "torch.bool"}

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "ImageError",
    "IsoImageProcessor",
    "IsoPruneConfig",
    "IsoPruneError",
    "IsoPruneForImageClassification",
    "SkippedBlock",
    "apply_structure",
    "build_base",
    "check_structure",
    "skippable_blocks",
]


class IsoPruneForImageClassification(PreTrainedModel):
    """An image classifier whose architecture is `config.base` changed by `config.structure`.

    An empty structure is the dense base itself: base and pruned are one class with one forward and one label map.
    """

    config: IsoPruneConfig
    config_class = IsoPruneConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True

    def __init__(self, config: IsoPruneConfig):
        super().__init__(config)
        self.model = build_pruned(config)
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            # The base has drawn its own weights; transformers would draw them a second time, otherwise.
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # timm: index tables and masks that are not in the file; where one was cut, all are in it.
        if hasattr(module, "init_non_persistent_buffers") and module._non_persistent_buffers_set:
            module.init_non_persistent_buffers()

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """Name -> the first name of the same tensor, under which alone it is saved."""
        first: dict[int, str] = {}
        named = {f"model.{name}": tensor for name, tensor in named_tensors(self.model).items()}
        return {name: found for name, t in named.items() if (found := first.setdefault(id(t), name)) != name}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Tell transformers which names to tie when it loads: whatever the base shares."""
        return self._tied_weights_keys

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: Images of shape (B, C, H, W), normalised by the folder's image processor.
            labels: Class indices of shape (B,); the loss is the cross-entropy.

        Returns:
            `loss` (if there are labels) and `logits` of shape (B, num_labels).
        """
        output = self.model(pixel_values.to(self.dtype))
        # The first entry of an output of transformers: not all types call it logits (PP-LCNet does not).
        logits = output if isinstance(output, torch.Tensor) else output[0]
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """Load as any transformers model; safetensors only, every tensor must match, and the model must run.

        Raises:
            CheckpointError: An entry of the config or a tensor of the file does not fit.
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
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # The last moment at which the model is on meta and nothing has been allocated.
        _check_tensors(model, state_dict, checkpoint_files or [])
        if any((model.config.structure or {}).values()):  # a base that does not run is the user's own
            with torch.device("meta"):
                run_once(build_pruned(model.config).eval(), model.config.image_size)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        for tensor in (*model.parameters(), *model.buffers()):
            # A mapped file gives tensors at any address, and kernels round differently where they are not aligned.
            if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
                tensor.data = tensor.data.clone()
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save config, weights and this file, so that the folder opens with and without isoprune_hf."""
        # Module names are the names in the file: the structure speaks of them, and loading compares them.
        kwargs["save_original_format"] = False
        names = {"AutoConfig": "IsoPruneConfig", "AutoModelForImageClassification": type(self).__name__}
        if self.config.base["library"] != "transformers":  # those keep their own processor
            names["AutoImageProcessor"] = "IsoImageProcessor"
        self.config.auto_map = {auto: f"modeling_isoprune.{name}" for auto, name in names.items()}
        keep_cut_buffers(self.model, self.config.structure)
        super().save_pretrained(save_directory, **kwargs)
        target = Path(save_directory) / "modeling_isoprune.py"
        if kwargs.get("is_main_process", True) and target.resolve() != Path(__file__).resolve():
            target.write_text(code_that_ships(), encoding="utf-8")


def code_that_ships() -> str:
    """Return the source of the file that travels with the weights: the modules of `PARTS`, one after another."""
    here = Path(__file__)
    if __name__ != f"{_PACKAGE}.checkpoint.modeling_isoprune":  # this is a shipped file: all parts are in it
        return here.read_text(encoding="utf-8")
    ours = re.compile(rf"^from {_PACKAGE}\.[\w.]+ import (\([^)]*\)|.*)\n", re.MULTILINE)
    return "\n\n".join(ours.sub("", (here.parents[1] / name).read_text(encoding="utf-8")) for name in PARTS)


def _check_files(folder: Path) -> None:
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            values = json.loads(index.read_text())
            names = [*values["weight_map"].values()] if isinstance(values["metadata"], dict) else [None]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{index.name}: not a readable index ({cause(error)})") from error
    for name in names:
        inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
        require(inside and (folder / name).is_file(), f"{name!r}: no such file in {folder}; weights must lie there")


def _check_tensors(model: nn.Module, state_dict: dict[str, torch.Tensor] | None, files: list[str]) -> None:
    found = {name: _describe(tensor.shape, _kind(tensor.dtype)) for name, tensor in (state_dict or {}).items()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    entry = opened.get_slice(name)
                    found[name] = _describe(entry.get_shape(), _DTYPES.get(entry.get_dtype(), entry.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{Path(file).name}: not a readable safetensors file ({error})") from error
    tied = model._tied_weights_keys
    expected = {
        name: _describe(tensor.shape, _kind(tensor.dtype))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    for name in sorted(expected.keys() | found.keys()):
        have, want = found.get(name, "no such tensor"), expected.get(name, "no such tensor")
        require(have == want, f"tensor {name!r}: the checkpoint has {have}, the config says {want}")


def _kind(dtype: torch.dtype) -> str:
    return "floats" if dtype.is_floating_point else str(dtype)


def _describe(shape: Sequence[int], kind: str) -> str:
    return f"{list(shape)} of {kind}"


def check_pixels(image: Image.Image) -> None:
    """Refuse, before it is decoded, an image of too many pixels: a few bytes of a file can stand for them."""
    if image.width * image.height > LARGEST_IMAGE:
        raise ImageError(f"image of {image.width} x {image.height} pixels: at most {LARGEST_IMAGE:,} are decoded")


class IsoImageProcessor(PilBackend):
    """Image processor that gives exactly the pixels of the evaluation transform of timm and torchvision.

    Differs from the processors of transformers by the centre crop, which rounds half to even as torchvision does.
    """

    size, crop_size = {"shortest_edge": 256}, {"height": 224, "width": 224}
    resample, default_to_square = 3, False
    image_mean, image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    do_convert_rgb = do_resize = do_center_crop = do_rescale = do_normalize = True

    def to_dict(self):
        values = super().to_dict()
        del values["image_processor_type"]
        return values

    def convert_to_rgb(self, image, input_data_format=None):
        if isinstance(image, Image.Image):
            check_pixels(image)  # a file is decoded only here
            return np.array(image.convert("RGB"))
        return super().convert_to_rgb(image, input_data_format)

    def center_crop(self, image, size, **kwargs):
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            return super().center_crop(image, size, **kwargs)
        top, left = round((height - size.height) / 2.0), round((width - size.width) / 2.0)
        return image[..., top : top + size.height, left : left + size.width]
