"""Put the weights of a file that a training wrote into a base: `open_with_weights`."""

import argparse
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError  # noqa: S403  # raised by torch.load, which here reads tensors only
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

# Undocumented; as of transformers 5.24: returns a state dict with the names that its files have.
from transformers.core_model_loading import revert_weight_conversion

from isoprune_hf.errors import RecipeError
from isoprune_hf.models.base import BaseModel, default_labels, single_line
from isoprune_hf.models.head import replace_head
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions, Opener, describe_source
from isoprune_hf.models.timm_base import processor_of_folder

logger = logging.getLogger(__name__)

# Entries of a checkpoint that hold the weights; those before others are preferred, as timm does.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_COUNTER = "num_batches_tracked"  # of BatchNorm; files of torch before 0.4.1 do not have it
_SHOWN = 3


class StoredWeights(NamedTuple):
    """The weights in a file.

    Args:
        tensors: Name -> tensor.
        entry: Names of the entries that hold them, such as `model_ema`; empty if the file has nothing else.
    """

    tensors: dict[str, Tensor]
    entry: str


class FittedWeights(NamedTuple):
    """Weights under the names of a model.

    Args:
        tensors: Name -> tensor.
        prefix: Prefix that the names had, such as `module.`.
        left_out: Names without this prefix.
    """

    tensors: dict[str, Tensor]
    prefix: str
    left_out: tuple[str, ...]


def open_with_weights(source: BaseSource, options: LoadOptions, file: str | Path, opener: Opener) -> BaseModel:
    """Open a base with the weights of a file; its head gets the size of the one in the file.

    Args:
        source: The architecture.
        options: Options of the base.
        file: A state dict as safetensors or of torch.save, possibly inside a checkpoint.
        opener: Opens the architecture.

    Returns:
        The base. Its image processor is the one that the folder of the file records, or that of the architecture.

    Raises:
        RecipeError: The file cannot be read, or its tensors are not those of the architecture.
    """
    stored = read_weights(file)
    is_cut_folder = any((source.config.get("structure") or {}).values())
    base = opener(source, replace(options, pretrained=is_cut_folder))
    fitted, layout = _fit(stored, base.model.model)
    count = base.model.config.num_labels or 0
    labels = None if is_cut_folder else head_size(fitted.tensors, layout, count)
    if labels is not None:
        names = options.label_names if options.label_names and len(options.label_names) == labels else None
        problem = base.model.config.problem_type
        base = replace_head(base, names or default_labels(labels), seed=options.seed, problem=problem)
        _, layout = _fit(stored, base.model.model)
    _check_fit(fitted.tensors, layout, base.model.model, file=file, name=source.name)
    _fill(base.model.model, fitted.tensors)
    if not is_cut_folder:
        base.model.config.source = {
            **describe_source(source, options),
            "weights": str(Path(file).expanduser().resolve()),
        }
    processor = processor_of_folder(Path(file).expanduser().parent, base)
    _log(source.name, file, stored, fitted, labels, has_processor=processor is not None)
    return base if processor is None else base._replace(processor=processor)


def read_weights(file: str | Path) -> StoredWeights:
    """Read the tensors of a file; nothing in it is executed.

    Raises:
        RecipeError: The file does not exist, cannot be read, or contains no state dict.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise RecipeError(f"prune.weights: {file} does not exist, or is not a file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments in checkpoints of timm
                content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise RecipeError(
            f"prune.weights: {file} contains other objects than tensors, and nothing in a file is executed: save "
            f"model.state_dict() alone; for a pruned module of the reference implementation, use `isoprune convert "
            f"{file}`"
        ) from error
    except (EOFError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise RecipeError(f"prune.weights: {file} is cut off or damaged: {single_line(error)}") from error
    return _find_tensors(content, file)


def _find_tensors(content: Any, file: str | Path) -> StoredWeights:
    """Return the state dict in the content of a file, which may be inside of one or more entries."""
    entries: list[str] = []
    while isinstance(content, Mapping) and len(entries) < len(_ENTRIES):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        inner = next((name for name in _ENTRIES if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            if tensors:
                return StoredWeights(tensors, ".".join(entries))
            break
        entries.append(inner)
        content = content[inner]
    found = f"the entries {', '.join(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
    raise RecipeError(f"prune.weights: {file} contains no state dict, but {found:.200}")


def fit_names(tensors: Mapping[str, Tensor], names: Collection[str]) -> FittedWeights:
    """Return tensors without the prefix that a wrapper of the model has added to their names.

    The prefix is the one with which most of the names are those of the model; `_orig_mod.`, which torch.compile adds,
    is removed anywhere in a name.

    Args:
        tensors: Tensors by their names in a file.
        names: Names of the model.
    """
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    counts: Counter[str] = Counter()
    for name in plain:
        starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        counts.update(name[:start] for start in starts if name[start:] in names)
    prefix = max(counts, key=lambda found: (counts[found], -len(found)), default="")
    inside = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    return FittedWeights(inside, prefix, tuple(sorted(name for name in plain if not name.startswith(prefix))))


def head_size(tensors: Mapping[str, Tensor], layout: Mapping[str, Tensor], count: int) -> int | None:
    """Return the number of classes in a file, if it is another one than that of a network; None otherwise.

    Args:
        tensors: Tensors of the file, by the names of the network.
        layout: Tensors of the network.
        count: Its number of classes.
    """
    sizes = {
        stored.shape[0]
        for name, tensor in layout.items()
        if (stored := tensors.get(name)) is not None
        and stored.shape != tensor.shape
        and tensor.shape[:1] == (count,)
        and stored.shape[1:] == tensor.shape[1:]
    }
    return sizes.pop() if len(sizes) == 1 else None


def _fit(stored: StoredWeights, network: nn.Module) -> tuple[FittedWeights, dict[str, Tensor]]:
    """Return the weights under the names of a network, with the tensors of the network under these names.

    Files of transformers have other names than its modules: those of the version that introduced the model.
    """
    layouts = [network.state_dict()]
    if isinstance(network, PreTrainedModel):
        layouts.append(revert_weight_conversion(network, layouts[0]))
    fits = [(fit_names(stored.tensors, layout.keys()), layout) for layout in layouts]
    return max(fits, key=lambda fit: len(fit[0].tensors.keys() & fit[1].keys()))


def _check_fit(
    tensors: Mapping[str, Tensor], layout: Mapping[str, Tensor], network: nn.Module, *, file: str | Path, name: str
) -> None:
    """Raise a RecipeError if a tensor is missing, is not one of the network, or has another shape."""
    unsaved = {key for key, _ in network.named_buffers()} - layout.keys()
    missing = sorted(key for key in layout.keys() - tensors.keys() if not key.endswith(_COUNTER))
    surplus = sorted(tensors.keys() - layout.keys() - unsaved)
    other = [key for key in layout if key in tensors and tensors[key].shape != layout[key].shape]
    shapes = [f"{key} {list(tensors[key].shape)}, not {list(layout[key].shape)}" for key in other]
    parts = [("missing", missing), ("surplus", surplus), ("of another shape", shapes)]
    found = "; ".join(f"{len(names)} {kind} ({_show(names)})" for kind, names in parts if names)
    if found:
        raise RecipeError(
            f"prune.weights: the tensors of {file} are not those of {name}: {found}; choose another --prune.model, or "
            "set --prune.model_args"
        )


def _fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load fitting tensors into a network, in place, in the type in which the file stores them."""
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(types) == 1:
        network.to(types.pop())
    own = network.state_dict()
    if isinstance(network, PreTrainedModel) and not tensors.keys() & own.keys() >= own.keys():
        read = type(network).from_pretrained(None, config=network.config, state_dict=dict(tensors))
        tensors = read.state_dict()
    network.load_state_dict({name: tensors.get(name, tensor) for name, tensor in own.items()})


def _show(names: Collection[str]) -> str:
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")


def _log(
    name: str,
    file: str | Path,
    stored: StoredWeights,
    fitted: FittedWeights,
    labels: int | None,
    *,
    has_processor: bool,
) -> None:
    parts = [
        f"entry {stored.entry}" if stored.entry else "",
        f"prefix {fitted.prefix} removed" if fitted.prefix else "",
        f"a head of {labels} classes" if labels is not None else "",
        f"left out: {_show(fitted.left_out)}" if fitted.left_out else "",
        "the image transform is that of its folder" if has_processor else "",
    ]
    found = "".join(f"; {part}" for part in parts if part)
    logger.info(f"{len(fitted.tensors)} tensors of {file} are the weights of {name}{found}")
