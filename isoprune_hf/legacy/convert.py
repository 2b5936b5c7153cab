"""Convert an old checkpoint to a model described by its base and its differences from it: `convert_file`."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, skippable_blocks
from isoprune_hf.checkpoint.settings import TRAINING_RATES
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.legacy.archive import LegacyArchive
from isoprune_hf.legacy.tree import OldModel, OldModule, Weights, find_model, is_plain
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.pruning.cost.macs import count_cost

# Modules that return their input in eval mode.
_IDENTITIES = {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropPath", "StochasticDepth"}
# Attributes that may differ from those of the base without an effect on the outputs.
_IGNORED_ATTRIBUTES = {
    "distilled_training",
    "fix_init",
    "fused_attn",
    "grad_checkpointing",
    "inplace",
    "memory_efficient",
    "momentum",
    "output_fmt",
    "scale_by_keep",
    "training",
    "weight_init",
    "weight_init_mode",
}


@dataclass(frozen=True, eq=False)
class Converted:
    """A converted model.

    Args:
        model: The model.
        processor: The image processor of its base.
        notes: Findings and checks, one line each.
    """

    model: IsoPruneForImageClassification
    processor: BaseImageProcessor
    notes: tuple[str, ...]


def convert_file(
    file: str | Path,
    *,
    base: str | None = None,
    model_args: dict[str, Any] | None = None,
    weights: Weights = "raw",
) -> Converted:
    """Convert a pickled module of timm or torchvision, without executing anything in the file.

    Args:
        file: File that torch.save wrote, with a module or a mapping with a module at "model".
        base: Name of the dense base as for `load_base`; needed if the file does not name it.
        model_args: Arguments of the base's architecture, such as {"img_size": 64}.
        weights: Take the trained weights themselves (raw), or their moving average (ema).

    Raises:
        CheckpointError: The file is damaged, contains something that is not allowed, or does not fit the base.
        RecipeError: The file does not exist, or the base must be given.
    """
    try:
        with LegacyArchive(file) as archive:
            old = find_model(archive.content(), weights)
            dense, found = _open_base(old, base, model_args or {})
            model = _describe(old, dense)
            _check_tensors(old, model)
            state = {f"model.{name}": archive.tensor(old.tensors[name]) for name in model.model.state_dict()}
            config = model.config
            model = IsoPruneForImageClassification.from_pretrained(None, config=config, state_dict=state).eval()
    except IsoPruneError as error:
        kind = RecipeError if isinstance(error, RecipeError) else CheckpointError
        raise kind(f"convert: {file} {error}") from error
    return Converted(model, dense.processor, (*_notes(file, old, model), *found))


def _notes(file: str | Path, old: OldModel, model: IsoPruneForImageClassification) -> tuple[str, ...]:
    config = model.config
    base = config.base or {}
    structure = config.structure or {}
    count = len(structure["removed"])
    removed = f"{count or 'no'} block{'s' * (count != 1)} removed"
    taken = f"{old.weights} weights in {str(model.dtype).removeprefix('torch.')}, stage {config.stage}"
    if config.source:
        taken += ", assumed to be cut from the trained weights of that base"
    return (
        f"{file}: a {old.modules[''].kind}, {len(old.modules)} modules; nothing in it was executed",
        f"base: {base['library']}/{base['architecture']}; {removed}, "
        f"{len(structure['shapes'])} tensors smaller; {taken}",
        f"rates of training, not part of the model: {_show_rates(_rates(old))}",
        "checked: the name and shape of every tensor, the class of every layer, every number and flag shared with the "
        "base, one run without weights; not checked: the logits, since that would execute the old module",
    )


def _open_base(old: OldModel, given: str | None, model_args: dict[str, Any]) -> tuple[BaseModel, tuple[str, ...]]:
    """Open the base without its weights, with its source and notes on that."""
    name = given or old.base
    if name is None:
        raise RecipeError(
            f"is a {old.modules[''].kind:.99} and does not name its base; set --base timm/NAME or torchvision/NAME"
        )
    library, _, short = name.rpartition("/")
    architecture = short.partition(".")[0]
    if given is None and library == "timm" and short not in timm.list_pretrained(f"{architecture}.*"):
        name = f"timm/{architecture}"  # the tag of an older timm that is gone
    base = load_base(name, pretrained=False, model_args=model_args)
    # Released models were cut from trained weights; other arguments or heads have no trained weights.
    pretrained = not model_args and old.num_labels in (None, base.model.config.num_labels)
    if not pretrained:
        base = load_base(name, pretrained=False, model_args=model_args, num_labels=old.num_labels)
    place = (base.model.config.source or {})["name"]
    base.model.config.source, notes = _trained_source(place) if pretrained else ({}, ())
    return base, notes


def _trained_source(name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the source of the trained weights of a base, and a note; with their fingerprint if they can be read."""
    try:
        source = load_base(name).model.config.source or {}
    except RecipeError as error:
        plain = {"name": name, "pretrained": True, "seed": 0, "model_args": {}}
        return plain, (f"not recorded: the fingerprint of the base's weights, which cannot be read: {error}",)
    return source, (f"recorded: the fingerprint of the base's weights, {source['fingerprint']}",)


def _describe(old: OldModel, base: BaseModel) -> IsoPruneForImageClassification:
    """Build the architecture of the old model on the meta device, with its complete config."""
    dense = base.model
    tensors = dense.model.state_dict()
    modules = dict(dense.model.named_modules())
    missing = [path for path in modules if path not in old.modules]
    removed: list[str] = []
    if any(next(modules[path].parameters(), None) is not None for path in missing):
        # Blocks of a list are renumbered when one is removed, so the missing ones are always the last.
        removed = [path for path in skippable_blocks(dense.config) if path in missing]
    removed_prefixes = tuple(f"{path}." for path in removed)
    present = {
        path: module
        for path, module in modules.items()
        if path not in removed and not path.startswith(removed_prefixes)
    }
    _check_modules(old, present)
    shapes = {
        name: list(old.tensors[name].shape)
        for name, tensor in tensors.items()
        if name in old.tensors
        and old.tensors[name].shape != tuple(tensor.shape)
        and not name.startswith(removed_prefixes)
    }
    attributes = {path: found for path, module in present.items() if (found := _attributes(old, path, module))}
    config = copy.deepcopy(dense.config)
    config.structure = {"shapes": shapes, "attributes": attributes, "removed": removed}
    config.stage = "finetuned" if old.is_trained else "pruned"
    config.recipe = {"convert": {"weights": old.weights, "class": old.modules[""].kind, "rates": _rates(old)}}
    shell = meta_copy(dense, dense=True)
    shell.config = config
    model = meta_copy(shell)
    costs = {"base": count_cost(dense), "pruned": count_cost(model)}
    model.config.cost = {name: cost.to_dict() for name, cost in costs.items()}
    return model


def _check_modules(old: OldModel, present: dict[str, nn.Module]) -> None:
    """Check that both models have modules of the same classes, and sequences in the same order."""
    for path in [*present, *(path for path in old.modules if path not in present)]:
        mine = present.get(path)
        theirs = old.modules.get(path)
        in_base = type(mine).__name__ if mine is not None else None
        in_file = theirs.name if theirs is not None else None
        is_leaf = (mine is None or not any(mine.children())) and (theirs is None or not theirs.children)
        is_identity = _IDENTITIES.issuperset(kind for kind in (in_base, in_file) if kind)
        if in_base != in_file and not (is_leaf and is_identity):
            raise CheckpointError(
                f"does not fit the base: {path or 'the model'!r:.99} is {_article(in_file)} in the file and "
                f"{_article(in_base)} in the base; set another --base or --model_args"
            )
        if isinstance(mine, nn.Sequential) and theirs is not None:
            _check_order(path, mine, theirs, old)


def _check_order(path: str, mine: nn.Sequential, theirs: OldModule, old: OldModel) -> None:
    order = [name for name, _ in mine.named_children() if f"{path}.{name}".lstrip(".") in old.modules]
    if [name for name in theirs.children if name in order] != order:
        raise CheckpointError(
            f"does not fit the base: {path or 'the model'!r:.99} runs its modules in the order "
            f"{', '.join(theirs.children):.99}, and the base in the order {', '.join(order):.99}"
        )


def _article(kind: str | None) -> str:
    return "nothing" if kind is None else f"a {kind:.99}"


def _attributes(old: OldModel, path: str, module: nn.Module) -> dict[str, Any]:
    """Return the numbers of a module that differ from the base; raise if another plain value differs."""
    theirs = _current_attributes(old, path, module)
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        now = theirs.get(name, value)
        if name.startswith("_") or now == value or name in TRAINING_RATES or name in _IGNORED_ATTRIBUTES:
            continue
        if _are_numbers(value) and _are_numbers(now):
            found[name] = list(now) if isinstance(now, tuple) else now
        elif is_plain(value):
            raise CheckpointError(
                f"does not fit the base: {name} of {path or 'the model'!r:.99} is {now!r:.99} in the file and "
                f"{value!r:.99} in the base; set another --base or --model_args"
            )
    return found


def _current_attributes(old: OldModel, path: str, module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, with those that its earlier library version did not have."""
    theirs = dict(old.modules[path].attributes)
    heads = theirs.get("num_heads")
    own = vars(module)
    qkv = old.tensors.get(f"{path}.qkv.weight")
    if type(heads) is int and heads > 0 and qkv is not None and qkv.shape[0] % (3 * heads) == 0:
        head_dim = qkv.shape[0] // (3 * heads)
        derived = {"head_dim": head_dim, "attn_dim": heads * head_dim}
        theirs |= {name: value for name, value in derived.items() if name in own}
    return theirs


def _are_numbers(value: Any) -> bool:
    return all(type(number) in (int, float) for number in (value if isinstance(value, tuple) else (value,)))


def _check_tensors(old: OldModel, model: IsoPruneForImageClassification) -> None:
    expected = model.model.state_dict()
    known = expected.keys() | {name for name, _ in model.model.named_buffers()}
    wrong = [name for name in expected if name not in old.tensors] or [
        name for name in old.tensors if name not in known
    ]
    if wrong:
        has, lacks = ("the base", "the file") if wrong[0] in expected else ("the file", "the base")
        raise CheckpointError(
            f"does not fit the base: {has} has a tensor {wrong[0]!r:.99}, but {lacks} has not; set another --base"
        )


def _rates(old: OldModel) -> dict[str, dict[str, float]]:
    """Return the dropout rates, above 0 and at most 1, of each module."""
    found = {}
    for path, module in old.modules.items():
        noted = {name: value for name, value in module.attributes.items() if name in TRAINING_RATES}
        rates = {name: float(value) for name, value in noted.items() if type(value) in (int, float) and 0 < value <= 1}
        if rates:
            found[path] = rates
    return found


def _show_rates(rates: dict[str, dict[str, float]]) -> str:
    def ranges() -> Iterator[str]:
        for name in sorted({name for entry in rates.values() for name in entry}):
            values = [entry[name] for entry in rates.values() if name in entry]
            yield f"{name} {min(values):.3g} to {max(values):.3g} in {len(values)} module{'s' * (len(values) > 1)}"

    return ", ".join(ranges()) or "none"
