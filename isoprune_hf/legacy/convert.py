"""Put an old model into ours: its base, what differs from it, and its tensors."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, skippable_blocks
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.legacy.archive import LegacyArchive
from isoprune_hf.legacy.tree import OldModel, Weights, find_model, is_plain
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.pruning.cost.macs import count_cost

# Modules that hand their input on when a model is not trained.
_IDLE = {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropPath", "StochasticDepth"}
# What only training asks for: reported and recorded, and no part of the structure.
_RATES = {"p", "drop_prob", "drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate"}
_FLAGS = {"training", "inplace", "fused_attn", "grad_checkpointing", "scale_by_keep", "distilled_training", "fix_init"}
_FLAGS |= {"weight_init_mode", "weight_init", "memory_efficient", "output_fmt", "momentum"}


@dataclass(frozen=True, eq=False)
class Converted:
    """A converted model.

    Args:
        model: The model.
        processor: The image processor of its base.
        notes: What was found and checked, a line each.
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
    """Read a pickled whole module of timm or torchvision without executing anything of it.

    Args:
        file: A file that torch.save wrote of a module, or of a mapping with a module at "model".
        base: Name of the dense base as for `load_base`, where the file does not tell.
        model_args: Arguments of the base's architecture, as {"img_size": 64}.
        weights: The trained weights themselves, or their moving average.

    Raises:
        CheckpointError: The file is damaged, holds what is not allowed, or does not fit the base.
        RecipeError: The file is not there, or the base must be given.
    """
    try:
        with LegacyArchive(file) as archive:
            old = find_model(archive.content(), weights)
            dense = _open_base(old, base, model_args or {})
            model = _describe(old, dense)
            _check_tensors(old, model)
            state = {f"model.{name}": archive.tensor(old.tensors[name]) for name in model.model.state_dict()}
            config = model.config
            model = IsoPruneForImageClassification.from_pretrained(None, config=config, state_dict=state).eval()
    except IsoPruneError as error:
        kind = RecipeError if isinstance(error, RecipeError) else CheckpointError
        raise kind(f"convert: {file} {error}") from error
    rates = config.recipe["convert"]["rates"]
    count = len(config.structure["removed"])
    removed = f"{count or 'no'} block{'s' * (count != 1)} removed"
    taken = f"{old.weights} weights in {str(model.dtype).removeprefix('torch.')}, stage {config.stage}"
    if config.source:
        taken += ", taken for one cut from the trained weights of that base"
    notes = (
        f"{file}: a {old.modules[''].kind}, {len(old.modules)} modules; nothing of it was executed",
        f"base: {config.base['library']}/{config.base['architecture']}; {removed}, "
        f"{len(config.structure['shapes'])} tensors smaller; {taken}",
        f"rates of training, not part of the model: {_show_rates(rates)}",
        "checked: every tensor's name and shape, the class of every layer, every number and flag that it shares with "
        "the base, one run without weights; not checked: the logits, since the old module would have to be executed",
    )
    return Converted(model, dense.processor, notes)


def _open_base(old: OldModel, given: str | None, model_args: dict[str, Any]) -> BaseModel:
    name = given or old.base
    if name is None:
        raise RecipeError(
            f"is a {old.modules[''].kind:.99}, and does not tell its base; give --base timm/NAME or torchvision/NAME"
        )
    library, _, short = name.rpartition("/")
    architecture = short.partition(".")[0]
    if given is None and library == "timm" and short not in timm.list_pretrained(f"{architecture}.*"):
        name = f"timm/{architecture}"  # tags come and go
    base = load_base(name, False, model_args=model_args)
    # The released models were cut from trained weights; of other architectures and heads there are none.
    pretrained = not model_args and old.num_labels in (None, base.model.config.num_labels)
    if not pretrained:
        base = load_base(name, False, model_args=model_args, num_labels=old.num_labels)
    source = {"name": name, "pretrained": True, "seed": 0, "model_args": {}} if pretrained else {}
    base.model.config.source = source
    return base


def _describe(old: OldModel, base: BaseModel) -> IsoPruneForImageClassification:
    """Build the old model's architecture on the meta device, with a config that holds all that is known."""
    dense = base.model
    tensors, modules = dense.model.state_dict(), dict(dense.model.named_modules())
    missing = [path for path in modules if path not in old.modules]
    removed: list[str] = []
    if any(next(modules[path].parameters(), None) is not None for path in missing):
        # Blocks of a list move up when one leaves, so the last ones are those that are missing.
        removed = [path for path in skippable_blocks(dense.config) if path in missing]
    gone = tuple(f"{path}." for path in removed)
    present = {path: module for path, module in modules.items() if path not in removed and not path.startswith(gone)}
    _check_modules(old, present)
    shapes = {
        name: list(old.tensors[name].shape)
        for name, tensor in tensors.items()
        if name in old.tensors and old.tensors[name].shape != tuple(tensor.shape) and not name.startswith(gone)
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
    """Check that both have modules of the same classes, in the same order where that is the order they run in."""
    for path in [*present, *(path for path in old.modules if path not in present)]:
        mine, theirs = present.get(path), old.modules.get(path)
        kinds = [type(mine).__name__ if mine is not None else None, theirs.name if theirs else None]
        is_leaf = (mine is None or not any(mine.children())) and (theirs is None or not theirs.children)
        if kinds[0] != kinds[1] and not (is_leaf and _IDLE.issuperset(kind for kind in kinds if kind)):
            raise CheckpointError(
                f"does not fit the base: {path or 'the model'!r:.99} is {_article(kinds[1])} in the file and "
                f"{_article(kinds[0])} in the base; give another --base or --model_args"
            )
        if isinstance(mine, nn.Sequential):
            order = [name for name, _ in mine.named_children() if f"{path}.{name}".lstrip(".") in old.modules]
            if [name for name in theirs.children if name in order] != order:
                raise CheckpointError(
                    f"does not fit the base: {path or 'the model'!r:.99} runs its modules in the order "
                    f"{', '.join(theirs.children):.99}, and the base in the order {', '.join(order):.99}"
                )


def _article(kind: str | None) -> str:
    return "nothing" if kind is None else f"a {kind:.99}"


def _attributes(old: OldModel, path: str, module: nn.Module) -> dict[str, Any]:
    """Find the numbers of a module that differ from the base's; other plain values must not differ."""
    theirs, found = _current(old, path, module), {}
    for name, value in vars(module).items():
        now = theirs.get(name, value)
        if name.startswith("_") or now == value or name in _RATES or name in _FLAGS:
            continue
        if _are_numbers(value) and _are_numbers(now):
            found[name] = list(now) if isinstance(now, tuple) else now
        elif is_plain(value):
            raise CheckpointError(
                f"does not fit the base: {name} of {path or 'the model'!r:.99} is {now!r:.99} in the file and "
                f"{value!r:.99} in the base; give another --base or --model_args"
            )
    return found


def _current(old: OldModel, path: str, module: nn.Module) -> dict[str, Any]:
    """Give a module's attributes; those that an earlier library did not have follow from the others."""
    theirs = dict(old.modules[path].attributes)
    heads, own = theirs.get("num_heads"), vars(module)
    qkv = old.tensors.get(f"{path}.qkv.weight")
    if type(heads) is int and heads > 0 and qkv is not None and qkv.shape[0] % (3 * heads) == 0:
        head_dim = qkv.shape[0] // (3 * heads)
        theirs |= {
            name: value for name, value in (("head_dim", head_dim), ("attn_dim", heads * head_dim)) if name in own
        }
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
            f"does not fit the base: {has} has a tensor {wrong[0]!r:.99} and {lacks} has not; give another --base"
        )


def _rates(old: OldModel) -> dict[str, dict[str, float]]:
    """Collect the rates of dropout and the like, above 0 and at most 1, which only training asks for."""
    found = {}
    for path, module in old.modules.items():
        noted = {name: value for name, value in module.attributes.items() if name in _RATES}
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
