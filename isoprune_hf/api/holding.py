"""Hold the module of a caller so that the pipeline can run it: `unwrap`, `share` and `hold`."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, describe_error
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models.base import default_labels, label_fields
from isoprune_hf.models.held import HeldModel
from isoprune_hf.models.objective import Objective
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.graph.copying import copy_modules, replace_tensor

_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks")
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and `torch.compile`.

    Raises:
        UnsupportedArchitectureError: The module is compiled by TorchScript, or has no parameter.
    """
    while type(model).__name__ in _WRAPPERS and type(model).__module__.startswith("torch."):
        model = getattr(model, _WRAPPERS[type(model).__name__])
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}: a module of TorchScript cannot be cut; pass the module that it was made from"
        )
    if next(model.parameters(), None) is None:
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no parameter, so there is nothing to prune")
    return model


def share(module: nn.Module) -> nn.Module:
    """Copy a module tree; parameters keep their memory, which the pipeline only reads, and buffers are copied.

    Of its hooks, those that belong to the model are copied: methods of its modules, and those of torch, such as
    `weight_norm`. The others observe or train the caller's model, and are left out.
    """

    def shared(tensor: Tensor) -> Tensor:
        is_parameter = isinstance(tensor, nn.Parameter)
        return replace_tensor(tensor, tensor.detach() if is_parameter else tensor.detach().clone())

    copied = copy_modules(module, shared, with_hooks=False)
    twins = dict(zip(module.modules(), copied.modules(), strict=True))
    for old, new in twins.items():
        for table in _HOOK_TABLES:
            kept = {number: _own_hook(hook, twins) for number, hook in vars(old)[table].items()}
            vars(new)[table].update({number: hook for number, hook in kept.items() if hook is not None})
            flags = f"{table}_with_kwargs"
            vars(new)[flags].update({number: flag for number, flag in vars(old)[flags].items() if kept[number]})
    return copied


def count_hooks(module: nn.Module) -> int:
    """Return the number of forward hooks of a module tree."""
    return sum(len(vars(part)[table]) for part in module.modules() for table in _HOOK_TABLES)


def _own_hook(hook: Any, twins: Mapping[nn.Module, nn.Module]) -> Any:
    """Return the hook for the copy of a module; None for a hook that does not belong to the model."""
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        twin = twins.get(hook.__self__)
        return None if twin is None else MethodType(hook.__func__, twin)
    return hook if type(hook).__module__.startswith("torch.") else None


def hold(module: nn.Module, example: Tensor, objective: Objective) -> HeldModel:
    """Return a copy of a module, which the pipeline may run, in eval mode.

    Args:
        module: The module.
        example: Inputs of the module, (B, ...).
        objective: The loss.

    Raises:
        UnsupportedArchitectureError: The module does not run on the example.
    """
    config = IsoPruneConfig()
    config.image_size = list(example.shape[1:])
    held = HeldModel(config, share(module), objective)
    held.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
    try:
        with scoring_mode(held, requires_grad=False), torch.no_grad():
            logits = held(pixel_values=example[:1].to(held.device)).logits
    except LIBRARY_ERRORS as error:  # of the module
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} does not run on inputs of shape {list(example.shape)}: {describe_error(error)}"
        ) from error
    for name, value in label_fields(default_labels(logits.shape[1])).items():
        setattr(config, name, value)
    return held
