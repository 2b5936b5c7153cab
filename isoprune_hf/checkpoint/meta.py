# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Build networks on the meta device whose constructors compute values (part of the shipped file).

`build_on_meta` keeps the tensors that no file will contain: buffers outside the state dict, and tensors that modules
hold as plain attributes. `move_to_meta` drops their values, too, so that the network runs on the meta device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from isoprune_hf.checkpoint.building import Building, check_tables, nested_tensors, on_meta


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network with its parameters and saved buffers on the meta device; the current default device is meta.

    A network that needs values is built a second time, with its parameters on meta and all else on the CPU: its
    constructor reads values of tensors, or computes tensors that are not saved. The random state is not changed.

    Args:
        build: Builds the network; called once or twice.

    Raises:
        ValueError: The builder takes more work or memory than that of any image classifier.
    """
    try:
        with Building():
            network = build()
    except (NotImplementedError, RuntimeError, TypeError):  # the builder reads values, or cannot build at all
        pass
    else:
        _check_unsaved(network)
        if next(_unsaved(network), None) is None:
            return network
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        with _parameters_on_meta(), Building():
            network = build()
        _check_unsaved(network)
        if any(tensor.is_meta for tensor in _unsaved(network)):  # computed on the device of a parameter
            with Building(has_weights=True):
                network = build()
    for module in network.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else _parameter_on_meta(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to("meta")
    return network


def unsaved_buffers(network: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Yield the buffers outside the state dict: module, name within the module, buffer."""
    for module in network.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield module, name, buffer


def move_to_meta(network: nn.Module) -> nn.Module:
    """Move a network to the meta device in place, with the tensors that its modules hold as attributes; return it."""
    network.to("meta")
    for module in network.modules():
        values = vars(module)
        for name, value in values.items():
            if not _is_registry(name) and next(nested_tensors(value), None) is not None:
                values[name] = on_meta(value)
    return network


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as soon as a module registers it."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else _parameter_on_meta(parameter)

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # a result replaces it
    try:
        yield
    finally:
        hook.remove()


def _parameter_on_meta(parameter: nn.Parameter) -> nn.Parameter:
    """Return the same parameter on the meta device; the same object for a parameter that several modules share."""
    if parameter.is_meta:
        return parameter
    moved: nn.Parameter | None = vars(parameter).get("moved")
    if moved is None:
        moved = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        vars(parameter)["moved"] = moved
    return moved


def _check_unsaved(network: nn.Module) -> None:
    """Check the sizes of all tensors that are neither parameters nor saved."""
    check_tables([*_unsaved(network), *(buffer for _, _, buffer in unsaved_buffers(network))])


def _unsaved(network: nn.Module) -> Iterator[torch.Tensor]:
    """Yield all tensors that are neither parameters nor saved, except those that timm computes after loading."""
    for module, _, buffer in unsaved_buffers(network):
        if not hasattr(module, "init_non_persistent_buffers"):
            yield buffer
    for module in network.modules():
        for name, value in vars(module).items():
            if not _is_registry(name):
                yield from nested_tensors(value)


def _is_registry(name: str) -> bool:
    return name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set") or name.endswith("_hooks")
