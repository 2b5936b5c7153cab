"""Find small variants of all image classifiers that timm, transformers and torchvision name: `coverage_named.json`.

    PYTHONPATH=.:tests python benchmarks/coverage_reduce.py [NAME ...]

Every architecture is built on the meta device. Those of up to 100 M parameters are tried with fewer blocks and smaller
images: of the arguments that a builder of timm passes to its model class, or of the config of transformers, those
named in `DEPTHS` become at most 1 (2 in the deepest stage), then 2, then 4; images have 64 pixels, then more. A model
is built for images of a size if its constructor takes one (`img_size`, `image_size`); other networks read images of
any size, or fail. The first variant that returns logits (B, classes) and can be trained on such images (auxiliary
heads need more pixels) is recorded, in the worst case the model as it is. Known models are not tried again.
"""

import argparse
import dataclasses
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import timm
import torch
import torchvision
import transformers
from coverage_anchor import LABELS, TIMM
from coverage_models import MAX_MILLIONS, NAMED, config_args, default_tower, found_rows
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

SIDES = (64, 96, 112, 128, 160, 192, 224, 256)
DEPTHS = {
    *("depth", "depths", "layers", "stages", "levels", "num_blocks", "num_blocks_list", "block_config", "k_sec"),
    *("serial_depths", "parallel_depth", "depth_list", "transformer_depths", "depth_token_only"),
    *("num_hidden_layers", "stage_num_blocks", "num_self_attends_per_block"),
}

Arguments = dict[str, Any]
Row = dict[str, Any]


class _RecordedError(Exception):
    """Ends a builder of timm once its arguments are known."""


@dataclass(frozen=True)
class Architecture:
    """An architecture of a library.

    Args:
        family: Its model file, or the type of transformers.
        build: Builds it with arguments on the default device.
        arguments: The arguments that its model class is built with, some of which are depths.
        size_argument: Name of the argument of the image size; None if there is none.
        side: Height and width of its own images.
    """

    family: str
    build: Callable[[Arguments], nn.Module]
    arguments: Arguments
    size_argument: str | None
    side: int


def reduce(architecture: Architecture, *, any_size: bool = False) -> Row:
    """Return the row of an architecture: its parameters in millions, and the arguments and image size of its variant.

    The row of a model of more than `MAX_MILLIONS` has no variant unless `any_size` is set.
    """
    row: Row = {"family": architecture.family}
    whole = _build(architecture.build, {})
    if isinstance(whole, Exception):
        return row | {"reason": f"it cannot be built: {' '.join(str(whole).split())[:99]}"}
    row["params"] = round(sum(parameter.numel() for parameter in whole.parameters()) / 1e6, 2)
    if row["params"] > MAX_MILLIONS and not any_size:
        return row
    if getattr(whole, "num_classes", LABELS) != LABELS:
        return row | {"reason": "it has no head and takes none: it returns features"}
    for args in variants(architecture.arguments):
        for side in (*(side for side in SIDES if side < architecture.side), architecture.side):
            sized = dict(args)
            if architecture.size_argument is not None and side != architecture.side:
                sized[architecture.size_argument] = side
            if is_classifier(architecture.build, sized, side):
                return row | {"args": sized, "side": side}
    return row | {"reason": "it returns no logits (B, classes) for images (B, 3, H, W)"}


def variants(arguments: Arguments) -> Iterator[Arguments]:
    """Yield arguments with ever more blocks, at last none: each only those that differ from the given ones."""
    depths = {name: arguments[name] for name in sorted(DEPTHS & arguments.keys()) if _is_depth(arguments[name])}
    tried: list[Arguments] = []
    for limit, deepest in ((1, 2), (2, 2), (4, 4), (sys.maxsize, sys.maxsize)):
        new = {name: fewer_blocks(value, limit, deepest) for name, value in depths.items()}
        new = {name: value for name, value in new.items() if value != _as_list(depths[name])}
        if new not in tried:
            tried.append(new)
            yield new


def fewer_blocks(depth: Any, limit: int, deepest: int) -> Any:
    """Return a depth of at most `2 * limit`, or the depths of stages: at most `limit`, `deepest` in the deepest."""
    if isinstance(depth, int):
        return min(depth, 2 * limit)
    if any(isinstance(each, list | tuple) for each in depth):
        return [fewer_blocks(each, limit, deepest) for each in depth]
    place = max(range(len(depth)), key=lambda index: depth[index])
    return [min(each, deepest if index == place else limit) for index, each in enumerate(depth)]


def _is_depth(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_depth(each) for each in value)
    return type(value) is int


def _as_list(value: Any) -> Any:
    return [_as_list(each) for each in value] if isinstance(value, list | tuple) else value


def _build(build: Callable[[Arguments], nn.Module], args: Arguments) -> nn.Module | Exception:
    """Build a network on meta, or on the CPU if it reads values; return the error if it rejects the arguments."""
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                return build(dict(args))
        except Exception as error:  # noqa: BLE001  # each library rejects arguments in its own way
            if not _needs_values(error):
                return error
    return ValueError("it reads values on the CPU")


def is_classifier(build: Callable[[Arguments], nn.Module], args: Arguments, side: int) -> bool:
    """Return whether the network that is built returns logits (2, LABELS) for two images and runs in train mode."""
    network = _build(build, args)
    if isinstance(network, Exception):
        return False
    error = _error_of_pass(network, side)
    if error is not None and _needs_values(error):  # it does not run on meta
        error = _error_of_pass(build(dict(args)), side)
    return error is None


def _error_of_pass(network: nn.Module, side: int) -> Exception | None:
    images = torch.zeros(2, 3, side, side, device=next(network.parameters()).device)
    try:
        with torch.no_grad():
            network.train()(images)
            logits = network.eval()(images)
    except Exception as error:  # noqa: BLE001  # each library rejects images in its own way
        return error
    logits = getattr(logits, "logits", getattr(logits, "last_hidden_state", logits))
    is_right = isinstance(logits, torch.Tensor) and logits.shape == (2, LABELS)
    return None if is_right else ValueError("no logits")


def _needs_values(error: Exception) -> bool:
    return isinstance(error, NotImplementedError) or "meta" in str(error)


def of_timm(name: str) -> Architecture:
    """Return an architecture of timm."""
    arguments = timm_arguments(name)
    side = timm.get_pretrained_cfg(name).input_size[-1]
    size_argument = "img_size" if "img_size" in arguments else None
    family = timm.models._registry._model_to_module[name]
    return Architecture(
        family, lambda args: timm.create_model(name, num_classes=LABELS, **args), arguments, size_argument, side
    )


def timm_arguments(name: str) -> Arguments:
    """Return the arguments that a builder of timm passes to its model class, and the defaults of the class."""
    found: Arguments = {}

    def record(model_class: type, variant: str, pretrained: bool, **kwargs: Any) -> None:
        defaults = inspect.signature(model_class.__init__).parameters.values()
        found.update({each.name: each.default for each in defaults if each.default is not each.empty})
        for config in filter(dataclasses.is_dataclass, kwargs.values()):  # arguments are laid over their fields
            found.update({field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
        found.update(kwargs)
        raise _RecordedError

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("timm.models.")]
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "build_model_with_cfg"):
                stack.enter_context(patch.object(module, "build_model_with_cfg", record))
        stack.enter_context(suppress(_RecordedError))
        timm.create_model(name)
    return found


def of_torchvision(name: str) -> Architecture:
    """Return an architecture of torchvision, whose builders take neither depths nor sizes."""
    builder = torchvision.models.get_model_builder(name)
    side = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    family = builder.__module__.rpartition(".")[2]
    return Architecture(family, lambda args: builder(weights=None, num_classes=LABELS, **args), {}, None, side)


def of_transformers(name: str) -> Architecture:
    """Return a class of transformers with the default config of its type."""
    kind = next(kind for kind, classes in CLASSIFIERS.items() if name in _class_names(classes))
    tower = default_tower(kind)
    size = getattr(tower, "image_size", 224)
    return Architecture(
        kind,
        lambda args: getattr(transformers, name)(CONFIG_MAPPING[kind](**config_args(kind, args), num_labels=LABELS)),
        tower.to_dict(),
        "image_size" if hasattr(tower, "image_size") else None,
        size[0] if isinstance(size, list | tuple) else size,
    )


def _class_names(classes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (classes,) if isinstance(classes, str) else classes


def all_names() -> list[str]:
    """Return `timm/NAME`, `torchvision/NAME` and `transformers/CLASS` of all that the libraries name."""
    return [
        *(f"timm/{name}" for name in timm.list_models() if not name.startswith("test_")),
        *(f"torchvision/{name}" for name in torchvision.models.list_models(torchvision.models)),
        *(f"transformers/{name}" for classes in CLASSIFIERS.values() for name in _class_names(classes)),
    ]


LIBRARIES = {"timm": of_timm, "torchvision": of_torchvision, "transformers": of_transformers}


def write(rows: dict[str, Row]) -> None:
    """Write the rows, one a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items())]
    NAMED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Reduce the models without a row, or the given ones again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*")
    given = parser.parse_args().names
    rows = found_rows() if NAMED.exists() else {}
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    smallest = {f"timm/{name}" for name in TIMM.values()}
    for index, name in enumerate(given or [name for name in all_names() if name not in rows]):
        library, _, model = name.partition("/")
        rows[name] = reduce(LIBRARIES[library](model), any_size=name in smallest)
        print(name, json.dumps(rows[name]), flush=True)
        if index % 25 == 0:
            write(rows)
    write(rows)


if __name__ == "__main__":
    main()
