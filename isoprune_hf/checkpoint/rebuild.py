# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Check, before a folder is written, that it will answer like the model in memory (part of the shipped file).

`settle_config` rebuilds the model from its config alone and compares the logits bit for bit.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, IsoPruneConfig, describe_error
from isoprune_hf.checkpoint.difference import named_tensors
from isoprune_hf.checkpoint.own_network import call_on, inputs_of
from isoprune_hf.checkpoint.settings import TRAINING_RATES, capture_settings, merge_settings
from isoprune_hf.errors import CheckpointError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NUM_IMAGES = 2
_SPREADS = 4  # times the difference of two passes of one network that logits may differ if it is not 0


def settle_config(model: PreTrainedModel, config: IsoPruneConfig) -> None:
    """Check that the config of a model builds a network with the same logits, bit for bit, on the same device.

    Hooks, modes and random state are left untouched. Of a model without weights or without an image size only the
    names and shapes of the tensors are compared.

    Args:
        model: The model in memory.
        config: Its config. If it builds another network, attributes and module types that were changed after the
            constructor are added to the entry `base`, in place.

    Raises:
        CheckpointError: The config cannot describe the model; the message names what differs.
    """
    network = model.model
    expected = _answer(network, config)
    difference = _difference(model, config, expected)
    if difference is None:
        return
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    settled = copy.deepcopy(config)
    record_settings(settled, built.model, network)
    is_new = (settled.base, settled.structure) != (config.base, config.structure)
    if is_new and _difference(model, settled, expected) is None:
        config.base, config.structure, config.format_version = settled.base, settled.structure, settled.format_version
        return
    raise CheckpointError(
        f"the model is not saved, since the folder would open as another network: {difference}; undo the change, or "
        "express it by the arguments of the base"
    )


def record_settings(config: IsoPruneConfig, built: nn.Module, network: nn.Module) -> None:
    """Add to a config, in place, the attributes and module types of a network that it does not describe.

    An attribute that `config.structure` sets is changed there, since the structure is applied after the base is built.

    Args:
        config: Config that builds `built`.
        built: The network that it builds; only types and attributes are read.
        network: The network to describe.
    """
    found = capture_settings(built, network)
    cut = (config.structure or {}).get("attributes") or {}
    settings = found.get("settings", {})
    for path in settings.keys() & cut.keys():
        changed = {name: settings[path].pop(name) for name in settings[path].keys() & cut[path].keys()}
        cut[path].update(changed)
    found = {**found, "settings": {path: values for path, values in settings.items() if values}}
    if found["settings"] or found.get("modules"):
        config.base = merge_settings(config.base or {}, found)
        config.format_version = max(config.format_version, 2)


def _difference(model: PreTrainedModel, config: IsoPruneConfig, expected: torch.Tensor | str | None) -> str | None:
    """Return what differs between a model and the one that `config` builds with its weights; None if nothing does."""
    if expected is None:
        return _other_tensor(model, config)
    tied = model._tied_weights_keys or {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    stored = copy.deepcopy(config)
    stored.dtype = model.dtype  # as transformers records it, and casts all tensors to it when it opens the folder
    try:
        with _without_bars():
            rebuilt: Any = type(model).from_pretrained(None, config=stored, state_dict=state)
    except CheckpointError as error:
        return _other_tensor(model, config) or str(error)
    rebuilt.to(model.device)
    # How attention is computed is chosen when a folder is opened, and rounds differently.
    for ours_part, rebuilt_part in zip(model.model.modules(), rebuilt.model.modules(), strict=False):
        if isinstance(ours_part, PreTrainedModel) and isinstance(rebuilt_part, PreTrainedModel):
            rebuilt_part.config._attn_implementation = ours_part.config._attn_implementation
    found = _answer(rebuilt.model, config)
    if _are_equal(found, expected) or _varies_as_much(model.model, config, found, expected):
        return None
    with _recorded_outputs(model.model) as ours, _recorded_outputs(rebuilt.model) as theirs:
        _answer(model.model, config)
        _answer(rebuilt.model, config)
    return next(_changes(rebuilt.model, model.model), None) or _first_other_output(ours, theirs)


def _other_tensor(model: PreTrainedModel, config: IsoPruneConfig) -> str | None:
    """Return the first tensor that `config` builds under another name or with another shape; None if none does."""
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    have, want = (
        {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for network in (model.model, built.model)
    )
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            shapes = [have.get(name, "no such tensor"), want.get(name, "no such tensor")]
            return f"tensor {name!r} is {shapes[0]} in memory and {shapes[1]} by the config"
    return None


@torch.no_grad()
def _answer(network: nn.Module, config: IsoPruneConfig) -> torch.Tensor | str | None:
    """Return the outputs for fixed random inputs in eval mode, or the error of a network that does not run on them.

    Returns:
        One tensor, or several in a row; None if the network has no weights or outputs, or the config no image size.
    """
    parameter = next((p for p in network.parameters() if p.is_floating_point()), None)
    if parameter is None or any(p.is_meta for p in network.parameters()) or config.image_size is None:
        return None
    generator = torch.Generator().manual_seed(0)

    def draw(shape: list[int]) -> torch.Tensor:
        return torch.randn(_NUM_IMAGES, *shape, generator=generator).to(parameter.device, parameter.dtype)

    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with _uncompiled(network):
            output = call_on(network, inputs_of(config.base, config.image_size), draw)
    except LIBRARY_ERRORS as error:
        return describe_error(error)
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = [*_tensors_in(output)]
    return found[0] if len(found) == 1 else torch.cat([tensor.flatten() for tensor in found]) if found else None


def _tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors of an output, possibly in nested sequences and mappings."""
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        yield output
    if isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors_in(part)


def _are_equal(first: torch.Tensor | str | None, second: torch.Tensor | str | None) -> bool:
    """Return whether two answers are the same; nan is equal to nan."""
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return first == second
    if first.shape != second.shape:
        return False
    return first.dtype == second.dtype and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _varies_as_much(
    network: nn.Module, config: IsoPruneConfig, found: torch.Tensor | str | None, expected: torch.Tensor | str | None
) -> bool:
    """Return whether logits differ no more than those of the network itself in two passes.

    On GPUs some operations add in another order each time, so not even the same network gives the same bits.
    """
    again = _answer(network, config)
    if not (
        isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor) and isinstance(again, torch.Tensor)
    ):
        return False
    if found.shape != expected.shape:
        return False
    spread, difference = ((answer - expected).abs().max() for answer in (again, found))
    return bool(0 < difference <= _SPREADS * spread)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Show no progress bars of transformers within the context: the caller saves a model and opens none."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped in transformers
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # untyped in transformers


def _uncompiled(network: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which compiled modules run as they do uncompiled, without other rounding."""
    is_compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def _changes(built: nn.Module, network: nn.Module) -> Iterator[str]:
    """Yield what differs between two networks with equal tensors, the most specific first."""
    tensors = named_tensors(network)
    for name, tensor in named_tensors(built).items():
        if name not in tensors or not torch.equal(tensor, tensors[name].to(tensor.device)):
            yield f"the buffer {name!r} has other values than the constructor computes, and is not saved"
    modules = dict(built.named_modules(remove_duplicate=False))
    for path, module in network.named_modules(remove_duplicate=False):
        other = modules.get(path)
        if other is None or type(other) is not type(module):
            yield f"{path!r} is {type(module).__name__} in memory and {type(other).__name__} by the config"
            return
        yield from _changed_attributes(path, other, module)


def _changed_attributes(path: str, built: nn.Module, module: nn.Module) -> Iterator[str]:
    kind = type(module).__name__
    if any(len(getattr(module, hooks)) != len(getattr(built, hooks)) for hooks in _HOOKS):
        yield f"{path!r} ({kind}) has forward hooks, which are not saved"
    before = vars(built)
    for name, value in vars(module).items():
        if name not in before and callable(value):
            yield f"{path!r} ({kind}) has another method {name!r} than its class"
        if name.startswith("_") or name in TRAINING_RATES or name == "training":
            continue
        plain = isinstance(value, bool | int | float | str | list | tuple | None)
        if plain and name in before and (type(value) is not type(before[name]) or value != before[name]):
            yield f"{path!r} ({kind}) has {name} {value!r:.99} in memory and {before[name]!r:.99} by the config"


@contextmanager
def _recorded_outputs(network: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the first tensor that each module returns, by path in the order of the calls."""
    outputs: dict[str, torch.Tensor] = {}

    def record(path: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, torch.Tensor):
                outputs.setdefault(path, first)

        return note

    handles = [module.register_forward_hook(record(path)) for path, module in network.named_modules()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _first_other_output(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    for path, output in ours.items():
        other = theirs.get(path)
        if other is None or other.shape != output.shape or not torch.equal(other, output):
            return f"{path!r} is the first module that returns something else"
    return "the forward pass returns something else"
