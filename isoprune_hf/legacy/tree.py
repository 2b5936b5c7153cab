"""Find the old model in what a checkpoint holds: its modules, their plain attributes and tensors, and its base."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from isoprune_hf.checkpoint.dense import MAX_MODULES
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.legacy.inert import Inert, StoredTensor

Weights = Literal["raw", "ema"]
_RAW_KEYS = ("model", "state_dict")  # the second one is that of timm's script
_EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
# Modules around a model, and where in them it lies.
_WRAPPERS = dict.fromkeys(("DataParallel", "DistributedDataParallel", "ModelEmaV2", "ModelEmaV3"), "module")
_WRAPPERS |= dict.fromkeys(("AveragedModel", "ExponentialMovingAverage"), "module")
# The same layer, as long as a model is not trained.
_SYNCHRONISED = {"SyncBatchNorm": "BatchNorm2d", "SyncBatchNormAct": "BatchNormAct2d"}
_LONGEST_NAME = 200
_RESNETS = {
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
        attributes: Its numbers, strings, flags and tuples of them.
        children: Names of the modules in it, in their order.
    """

    kind: str
    attributes: dict[str, Any]
    children: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the class alone: libraries move classes between their modules."""
        name = self.kind.rpartition(".")[2]
        return _SYNCHRONISED.get(name, name)


@dataclass(frozen=True)
class OldModel:
    """An old model.

    Args:
        modules: Path -> module; the model itself has the path "".
        tensors: Path -> parameter or buffer.
        base: Name of the dense base for `load_base`; None where the file does not tell.
        num_labels: Size of its head; None where the file does not tell.
        is_trained: Whether it lies in a checkpoint of training, and not alone as it was cut.
        weights: Which of the two sets of weights was taken.
    """

    modules: dict[str, OldModule]
    tensors: dict[str, StoredTensor]
    base: str | None
    num_labels: int | None
    is_trained: bool
    weights: Weights


def find_model(content: Any, weights: Weights) -> OldModel:
    """Find the model that is to be converted.

    Args:
        content: What the file holds, of `read_inert`.
        weights: The trained weights themselves, or their moving average.

    Raises:
        CheckpointError: There is no module in it, or one that cannot be followed.
        RecipeError: The average is asked for and there is none.
    """
    root, average = _choose(content, weights)
    modules, tensors, unsaved = {}, {}, set()
    for path, node in _walk(root):
        state = node.state
        hooks = [name for name in ("_forward_hooks", "_forward_pre_hooks") if state.get(name)]
        if hooks:
            raise CheckpointError(f"has {hooks[0]} at {path or 'the model'!r}, which cannot be taken over")
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


def _choose(content: Any, weights: Weights) -> tuple[Inert, dict[str, Any] | None]:
    """Give the module, and the tensors of its average where only these were saved."""
    if _is_module(content):
        root, wrappers = _unwrap(content)
        is_average = any("Ema" in kind or "Average" in kind for kind in wrappers)
        if weights == "ema" and not is_average:
            raise RecipeError("holds one module and no average of its weights; leave --weights ema out")
        return root, None
    if not isinstance(content, dict):
        raise CheckpointError(f"holds {_describe(content)}, and no module and no mapping with one")
    raw = next((content[key] for key in _RAW_KEYS if _is_module(content.get(key))), content.get("model"))
    if weights == "ema":
        found = [(key, content[key]) for key in _EMA_KEYS if isinstance(content.get(key), dict | Inert)]
        if not found:
            raise RecipeError(f"holds no average of weights ({_keys(content)}); leave --weights ema out")
        key, average = found[0]
        if _is_module(average):
            return _unwrap(average)[0], None
        if not isinstance(average, dict) or not _is_module(raw):
            raise CheckpointError(f"holds only tensors at {key!r}, and no module at 'model' that they belong to")
        return _unwrap(raw)[0], average
    if _is_module(raw):
        return _unwrap(raw)[0], None
    if any(isinstance(value, StoredTensor) for value in (raw if isinstance(raw, dict) else content).values()):
        raise CheckpointError(
            "holds a state_dict and no module, and the head counts of a pruned model are not in its tensors; load it "
            "into the module that it belongs to, save that module whole with torch.save, and convert that file"
        )
    raise CheckpointError(f"holds no module at 'model' ({_keys(content)})")


def _unwrap(node: Inert) -> tuple[Inert, list[str]]:
    kinds: list[str] = []
    while node.kind.rpartition(".")[2] in _WRAPPERS and len(kinds) < 8:
        kinds.append(node.kind.rpartition(".")[2])
        inner = _mapping(node.state, "_modules").get(_WRAPPERS[kinds[-1]])
        if not _is_module(inner):
            raise CheckpointError(f"holds a {kinds[-1]} without a module in it")
        node = inner
    return node, kinds


def _average(average: dict[Any, Any], tensors: dict[str, StoredTensor], unsaved: set[str]) -> dict[str, StoredTensor]:
    """Take the tensors of a saved average in place of those of the module."""
    named = {key: value for key, value in average.items() if isinstance(key, str) and isinstance(value, StoredTensor)}
    named.pop("n_averaged", None)
    while named and all(key.startswith("module.") for key in named):
        named = {key.removeprefix("module."): value for key, value in named.items()}
    for name, tensor in named.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise CheckpointError(f"holds an average whose tensor {name!r:.99} is not one of the module")
    missing = sorted(tensors.keys() - named.keys() - unsaved)
    if missing:
        raise CheckpointError(f"holds an average without the tensor {missing[0]!r:.99} of the module")
    return tensors | named


def _walk(root: Inert) -> Iterator[tuple[str, Inert]]:
    pending, count = [("", root)], 0
    while pending:
        path, node = pending.pop()
        count += 1
        children = _children(node).items()
        if count + len(pending) + len(children) > MAX_MODULES or path.count(".") > 64:
            raise CheckpointError(f"holds more than {MAX_MODULES} modules, or modules in a circle")
        yield path, node
        pending += reversed([(f"{path}.{name}" if path else name, child) for name, child in children])


def _children(node: Inert) -> dict[str, Inert]:
    children = {name: child for name, child in _mapping(node.state, "_modules").items() if child is not None}
    for name, child in children.items():
        if not _is_module(child):
            raise CheckpointError(f"is damaged: the module {name!r:.99} of a {node.kind:.99} is {_describe(child)}")
    return children


def _mapping(state: dict[str, Any], name: str) -> dict[str, Any]:
    values = state.get(name)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(f"is damaged: {name} of a module is no mapping of names")
    longest = max(map(len, values), default=0)
    if longest > _LONGEST_NAME:
        raise CheckpointError(f"is damaged: {name} of a module has a name of {longest} characters")
    return values


def _names(value: Any) -> list[str]:
    """Give the strings of a set, which is a list here, or a call with one."""
    items = value.args[0] if isinstance(value, Inert) and value.args else value
    return [item for item in items if isinstance(item, str)] if isinstance(items, list) else []


def _is_module(value: Any) -> bool:
    return isinstance(value, Inert) and isinstance(value.state.get("_modules"), dict)


def is_plain(value: Any) -> bool:
    """Say whether a value is a number, text, a flag, None or a tuple of these."""
    values = value if isinstance(value, tuple) else (value,)
    return all(isinstance(item, int | float | str | None) for item in values)


def _describe(value: Any) -> str:
    return f"a {value.kind:.99}" if isinstance(value, Inert) else f"a {type(value).__name__}"


def _keys(content: dict[Any, Any]) -> str:
    shown = [repr(key[:40]) if isinstance(key, str) else _describe(key) for key in list(content)[:12]]
    return f"its entries are {', '.join(shown) or 'none'}"


def _timm_base(root: Inert) -> str | None:
    """Read the architecture, and the tag of the weights, that timm notes on each model."""
    for name in ("pretrained_cfg", "default_cfg"):
        noted = root.state.get(name)
        noted = noted.state if isinstance(noted, Inert) else noted
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
