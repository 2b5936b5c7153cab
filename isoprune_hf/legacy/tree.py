"""Find the model in the content of a checkpoint: its modules, their plain attributes, tensors, and base."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.legacy.pickle_reader import ObjectRecord, StoredTensor
from isoprune_hf.legacy.work import Work
from isoprune_hf.limits import MAX_MODULES

Weights = Literal["raw", "ema"]
_RAW_KEYS = ("model", "state_dict")  # the second is used by the training script of timm
_EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
# Modules that wrap a model -> attribute with the model.
_WRAPPERS = {
    "AveragedModel": "module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "ExponentialMovingAverage": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
}
# Layers of distributed training -> the same layer in eval mode.
_SYNCHRONISED = {"SyncBatchNorm": "BatchNorm2d", "SyncBatchNormAct": "BatchNormAct2d"}
_MAX_WRAPPERS = 8
_MAX_NAME_LENGTH = 200
_MAX_MODULE_DEPTH = 64
_NAME_CHARACTERS = 64  # of a path that count as one step
# (block, blocks of each stage, groups, base_width) -> architecture of torchvision.
_RESNETS: dict[tuple[object, ...], str] = {
    ("BasicBlock", (2, 2, 2, 2), 1, 64): "resnet18",
    ("BasicBlock", (3, 4, 6, 3), 1, 64): "resnet34",
    ("Bottleneck", (3, 4, 6, 3), 1, 64): "resnet50",
    ("Bottleneck", (3, 4, 23, 3), 1, 64): "resnet101",
    ("Bottleneck", (3, 8, 36, 3), 1, 64): "resnet152",
    ("Bottleneck", (3, 4, 6, 3), 1, 128): "wide_resnet50_2",
    ("Bottleneck", (3, 4, 23, 3), 1, 128): "wide_resnet101_2",
    ("Bottleneck", (3, 4, 6, 3), 32, 4): "resnext50_32x4d",
    ("Bottleneck", (3, 4, 23, 3), 32, 8): "resnext101_32x8d",
}


@dataclass(frozen=True)
class OldModule:
    """A module of an old model.

    Args:
        kind: Full name of its class.
        attributes: Numbers, strings, flags and tuples of these.
        children: Names of its direct submodules, in their order.
    """

    kind: str
    attributes: dict[str, Any]
    children: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the class without its module: libraries move classes between modules."""
        name = self.kind.rpartition(".")[2]
        return _SYNCHRONISED.get(name, name)


@dataclass(frozen=True)
class OldModel:
    """An old model.

    Args:
        modules: Path -> module; the model itself has the path "".
        tensors: Path -> parameter or buffer.
        base: Name of the dense base for `load_base`; None if the file does not name it.
        num_labels: Size of the head; None if the file does not contain it.
        is_trained: The model is part of a training checkpoint; otherwise it was saved right after the cut.
        weights: The set of weights that was read.
    """

    modules: dict[str, OldModule]
    tensors: dict[str, StoredTensor]
    base: str | None
    num_labels: int | None
    is_trained: bool
    weights: Weights


def find_model(content: Any, weights: Weights) -> OldModel:
    """Find the model in the content of a checkpoint.

    Args:
        content: Result of `read_pickle`.
        weights: Take the trained weights themselves (raw), or their moving average (ema).

    Raises:
        CheckpointError: The checkpoint contains no module, or a module that cannot be read.
        RecipeError: The average is asked for, but missing.
    """
    root, average = _choose(content, weights)
    modules: dict[str, OldModule] = {}
    tensors: dict[str, StoredTensor] = {}
    unsaved: set[str] = set()
    work = Work()
    for path, node in _walk(root):
        state = node.state
        work.spend(_size(node, len(path)))
        hooks = [name for name in ("_forward_hooks", "_forward_pre_hooks") if state.get(name)]
        if hooks:
            raise CheckpointError(f"has {hooks[0]} at {path or 'the model'!r}, which cannot be converted")
        prefix = f"{path}." if path else ""
        attributes = {key: value for key, value in state.items() if isinstance(key, str) and is_plain(value)}
        modules[path] = OldModule(node.kind, attributes, tuple(_children(node)))
        unsaved |= {f"{prefix}{name}" for name in _names(state.get("_non_persistent_buffers_set"))}
        for part in ("_parameters", "_buffers"):
            for name, tensor in _mapping(state, part).items():
                if isinstance(tensor, StoredTensor):
                    tensors[f"{prefix}{name}"] = tensor
    if average is not None:
        tensors = _average(average, tensors, unsaved)
    base = _timm_base(root) if root.kind.startswith("timm.") else _torchvision_base(modules)
    return OldModel(modules, tensors, base, _count_labels(modules, tensors), isinstance(content, dict), weights)


def _choose(content: Any, weights: Weights) -> tuple[ObjectRecord, dict[str, Any] | None]:
    """Return the module, and the tensors of its average if these were saved without a module."""
    if _is_module(content):
        root, wrappers = _unwrap(content)
        is_average = any("Ema" in kind or "Average" in kind for kind in wrappers)
        if weights == "ema" and not is_average:
            raise RecipeError("contains one module and no average of its weights; omit --weights ema")
        return root, None
    if not isinstance(content, dict):
        raise CheckpointError(f"contains {_describe(content)} instead of a module or a mapping with one")
    raw: Any = next((content[key] for key in _RAW_KEYS if _is_module(content.get(key))), content.get("model"))
    if weights == "ema":
        found = [(key, content[key]) for key in _EMA_KEYS if isinstance(content.get(key), dict | ObjectRecord)]
        if not found:
            raise RecipeError(f"contains no average of weights ({_keys(content)}); omit --weights ema")
        key, average = found[0]
        if _is_module(average):
            return _unwrap(average)[0], None
        if not isinstance(average, dict) or not _is_module(raw):
            raise CheckpointError(f"contains only tensors at {key!r}, and no module at 'model' to which they belong")
        return _unwrap(raw)[0], average
    if _is_module(raw):
        return _unwrap(raw)[0], None
    mappings = [content, *(content[key] for key in (*_RAW_KEYS, *_EMA_KEYS) if isinstance(content.get(key), dict))]
    if any(isinstance(value, StoredTensor) for mapping in mappings for value in mapping.values()):
        raise CheckpointError(
            "contains a state_dict and no module: the weights of an architecture that is not pruned are used with "
            "--prune.model, such as timm/resnet50, and --prune.weights; those of a pruned model do not determine its "
            "number of heads: load them into its module, save the whole module with torch.save, and convert that file"
        )
    raise CheckpointError(f"contains no module at 'model' ({_keys(content)})")


def _unwrap(node: ObjectRecord) -> tuple[ObjectRecord, list[str]]:
    kinds: list[str] = []
    while node.kind.rpartition(".")[2] in _WRAPPERS and len(kinds) < _MAX_WRAPPERS:
        kinds.append(node.kind.rpartition(".")[2])
        inner: Any = _mapping(node.state, "_modules").get(_WRAPPERS[kinds[-1]])
        if not _is_module(inner):
            raise CheckpointError(f"contains a {kinds[-1]} without a module in it")
        node = inner
    return node, kinds


def _average(average: dict[Any, Any], tensors: dict[str, StoredTensor], unsaved: set[str]) -> dict[str, StoredTensor]:
    """Return the tensors of the module, replaced by those of a saved average."""
    named = {key: value for key, value in average.items() if isinstance(key, str) and isinstance(value, StoredTensor)}
    named.pop("n_averaged", None)
    _check_names(named, "an average")
    while named and all(key.startswith("module.") for key in named):
        named = {key.removeprefix("module."): value for key, value in named.items()}
    for name, tensor in named.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"contains an average whose tensor {name!r:.99} is not in the module, or has another shape there"
            )
    missing = sorted(tensors.keys() - named.keys() - unsaved)
    if missing:
        raise CheckpointError(f"contains an average without the tensor {missing[0]!r:.99} of the module")
    return tensors | named


def _walk(root: ObjectRecord) -> Iterator[tuple[str, ObjectRecord]]:
    pending, count = [("", root)], 0
    while pending:
        path, node = pending.pop()
        count += 1
        children = _children(node).items()
        if count + len(pending) + len(children) > MAX_MODULES or path.count(".") > _MAX_MODULE_DEPTH:
            raise CheckpointError(f"contains more than {MAX_MODULES} modules, or a module inside itself")
        yield path, node
        pending += reversed([(f"{path}.{name}" if path else name, child) for name, child in children])


def _size(node: ObjectRecord, length: int) -> int:
    """Return the number of entries of a module, each also counted by the length of the names that they get."""
    values = [node.state.get("_non_persistent_buffers_set"), *node.state.values()]
    records = [part for value in values if isinstance(value, ObjectRecord) for part in value.args]
    entries = sum(len(part) for part in (*values, *records) if isinstance(part, list | tuple | dict))
    return (len(node.state) + entries) * (1 + length // _NAME_CHARACTERS)


def _children(node: ObjectRecord) -> dict[str, ObjectRecord]:
    children = {name: child for name, child in _mapping(node.state, "_modules").items() if child is not None}
    for name, child in children.items():
        if not _is_module(child):
            raise CheckpointError(f"is damaged: the module {name!r:.99} of a {node.kind:.99} is {_describe(child)}")
    return children


def _mapping(state: dict[str, Any], name: str) -> dict[str, Any]:
    values = state.get(name)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(f"is damaged: {name} of a module is not a mapping of names")
    _check_names(values, f"{name} of a module")
    return values


def _check_names(names: Collection[str], owner: str) -> None:
    longest = max(map(len, names), default=0)
    if longest > _MAX_NAME_LENGTH:
        raise CheckpointError(f"is damaged: {owner} has a name of {longest} characters")


def _names(value: Any) -> list[str]:
    """Return the strings in a set, which the reader returns as a list or as a call with a list."""
    items = value.args[0] if isinstance(value, ObjectRecord) and value.args else value
    return [item for item in items if isinstance(item, str)] if isinstance(items, list) else []


def _is_module(value: Any) -> TypeGuard[ObjectRecord]:
    return isinstance(value, ObjectRecord) and isinstance(value.state.get("_modules"), dict)


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, text, a flag, None or a tuple of these."""
    values = value if isinstance(value, tuple) else (value,)
    return all(isinstance(item, int | float | str | None) for item in values)


def _describe(value: Any) -> str:
    return f"a {value.kind:.99}" if isinstance(value, ObjectRecord) else f"a {type(value).__name__}"


def _keys(content: dict[Any, Any]) -> str:
    shown = [repr(key[:40]) if isinstance(key, str) else _describe(key) for key in list(content)[:12]]
    return f"its entries are {', '.join(shown) or 'none'}"


def _timm_base(root: ObjectRecord) -> str | None:
    """Return the name of the base from the architecture and weight tag that timm stores on each model."""
    for name in ("pretrained_cfg", "default_cfg"):
        noted = root.state.get(name)
        noted = noted.state if isinstance(noted, ObjectRecord) else noted
        if isinstance(noted, dict) and isinstance(noted.get("architecture"), str):
            tag = noted.get("tag")
            text = f"timm/{noted['architecture']}" + (f".{tag}" if isinstance(tag, str) and tag else "")
            return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) else None
    return None


def _torchvision_base(modules: dict[str, OldModule]) -> str | None:
    root = modules[""]
    if root.kind == "torchvision.models.mobilenetv2.MobileNetV2":
        return "torchvision/mobilenet_v2"
    if root.kind != "torchvision.models.resnet.ResNet":
        return None
    depths = tuple(
        len([path for path in modules if re.fullmatch(rf"layer{stage}\.\d+", path)]) for stage in range(1, 5)
    )
    block = modules["layer1.0"].name if "layer1.0" in modules else ""
    known = _RESNETS.get((block, depths, root.attributes.get("groups"), root.attributes.get("base_width")))
    return known and f"torchvision/{known}"


def _count_labels(modules: dict[str, OldModule], tensors: dict[str, StoredTensor]) -> int | None:
    noted = modules[""].attributes.get("num_classes")
    if type(noted) is int and any(tensor.shape[:1] == (noted,) for tensor in tensors.values()):
        return noted
    heads = [path for path, module in modules.items() if module.name == "Linear" and f"{path}.weight" in tensors]
    return tensors[f"{heads[-1]}.weight"].shape[0] if heads else None
