"""Hold the module of a caller so that the pipeline can run it: `unwrap`, `share` and `hold`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TimmWrapperForImageClassification

from isoprune_hf.api.batches import CallerBatch
from isoprune_hf.api.objectives import Loss, choose_objective, drawn_objective
from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, describe_error
from isoprune_hf.checkpoint.image_pass import take_images
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, model_class_of
from isoprune_hf.checkpoint.pretrained import IsoPrunePreTrainedModel
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models.base import default_labels, label_fields
from isoprune_hf.models.calling import CallForm, adapt, input_dtype
from isoprune_hf.models.from_module import Recognised, classes_in, form_without_labels, recognise
from isoprune_hf.models.held import HeldModel, require_repeatable
from isoprune_hf.models.nested import separate
from isoprune_hf.models.processors import processed_size
from isoprune_hf.pruning.calibration.calibration import Batch
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.calibration.pass_state import undoing_passes
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
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedArchitectureError(
                f"{name or type(model).__name__}: a module of TorchScript cannot be cut; use the module that it was "
                "made from"
            )
    if next(model.parameters(), None) is None:
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no parameter, so there is nothing to prune")
    return model


def inner_of(module: nn.Module) -> nn.Module:
    """Return the network inside one of our models or of TimmWrapper; other modules are returned as they are."""
    if isinstance(module, TimmWrapperForImageClassification):
        network: nn.Module = module.timm_model
        return network
    return module.model if is_ours(module) else module


def is_ours(module: nn.Module) -> TypeGuard[IsoPrunePreTrainedModel]:
    """Return whether a module is a whole model of isoprune_hf, of any task, and not the encoder of another one."""
    is_whole = isinstance(module, IsoPrunePreTrainedModel) and isinstance(module, model_class_of(module.config))
    return isinstance(module, HeldModel) or is_whole


def share(module: nn.Module) -> nn.Module:
    """Copy a module tree; parameters keep their memory, which the pipeline only reads, and buffers are copied.

    Of its hooks, those that belong to the model are copied: methods of its modules, and those of torch, such as
    `weight_norm`. The others observe or train the caller's model, and are left out. A network of images and texts
    takes images first and alone, see `take_images`.
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
    form = form_without_labels(copied)
    return take_images(copied) if form is not None and form.reads_texts else copied


def count_hooks(module: nn.Module) -> int:
    """Return the number of forward hooks of a module tree."""
    return sum(len(vars(part)[table]) for part in module.modules() for table in _HOOK_TABLES)


def _own_hook(hook: Any, twins: Mapping[nn.Module, nn.Module]) -> Any:
    """Return the hook for the copy of a module; None for a hook that does not belong to the model."""
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        twin = twins.get(hook.__self__)
        return None if twin is None else MethodType(hook.__func__, twin)
    return hook if type(hook).__module__.startswith("torch.") else None


@dataclass(frozen=True, eq=False)
class Held:
    """A module that the pipeline may run, with the batches in the form that the pipeline takes.

    Args:
        model: The module with its loss.
        read: Returns inputs and targets of a batch.
        processor: The image processor of its weights, if it is known.
        form: Its inputs.
    """

    model: HeldModel
    read: Callable[[CallerBatch], Batch]
    processor: BaseImageProcessor | None
    form: CallForm


def hold(
    module: nn.Module,
    batches: Sequence[CallerBatch],
    loss: Loss | None,
    *,
    reads_targets: bool,
    known: Recognised | None = None,
) -> Held:
    """Return a copy of a module, which the pipeline may run, in eval mode.

    Args:
        module: The module.
        batches: Batches of its inputs; the module runs on the first one.
        loss: See `choose_objective`.
        reads_targets: Targets are needed; otherwise none are looked at.
        known: The config that builds the module, if it is known.

    Raises:
        UnsupportedArchitectureError: The module does not run on the first batch, or its features are random.
        RecipeError, DatasetError: See `choose_objective`.
    """
    first = batches[0]
    task = form_without_labels(module)
    kept = task.outputs if task is not None and loss is None else ()
    form = CallForm(first.names, tuple(value.shape[1:] for value in first.inputs), kept)
    copied = share(module).eval()
    output = run_module(copied, form, first.inputs)
    seen = batches if reads_targets else [first._replace(targets=None)]
    size = list(form.pack([value[:1] for value in first.inputs]).shape[1:])
    if known is None and form.names == (None,):
        known = recognise(copied, size)
    described = config_of(copied, known)
    has_targets = any(isinstance(one.targets, Tensor) for one in seen)
    if loss is None and task is not None and not (task.names_classes and has_targets):
        chosen = drawn_objective(output, task, classes_in(module))
    else:
        chosen = choose_objective(output, seen, form, loss, None if described is None else described.problem_type)
    objective = chosen.objective
    if form.names != (None,) or not _is_traced(output):
        adapt(copied, form)
    labels = objective.logits(separate(output)[0]).shape[1] if objective.divergence is not None else 1
    config = IsoPruneConfig(**label_fields(default_labels(labels))) if known is None else known.config
    config.image_size = size
    config.source = config.source or {}  # where the weights come from may be unknown
    model = HeldModel(config, copied, objective)
    model.eval()  # type: ignore[no-untyped-call]  # untyped in transformers
    if task is not None:
        require_repeatable(model)

    def read(batch: CallerBatch) -> Batch:
        inputs = form.pack(batch.inputs)
        return inputs, _predicted_classes(model, inputs) if chosen.targets is None else chosen.targets(batch)

    processor = None if known is None else known.processor
    if processor is not None and processed_size(type(module).__name__, processor) != size:
        processor = None  # it makes other images than the batches have
    return Held(model, read, processor, form)


def config_of(module: nn.Module, known: Recognised | None) -> PreTrainedConfig | None:
    """Return the config that builds a module, or that of a model of transformers; None for other modules."""
    if known is not None:
        return known.config
    return module.config if isinstance(module, PreTrainedModel) else None


def _is_traced(output: Any) -> bool:
    """Return whether the trace keeps the sizes of an output as it is: a tensor, or a mapping with logits alone."""
    return isinstance(output, Tensor) or (isinstance(output, Mapping) and set(output) == {"logits"})


def run_module(module: nn.Module, form: CallForm, inputs: Sequence[Tensor]) -> Any:
    """Run a module in eval mode.

    Raises:
        UnsupportedArchitectureError: It does not run.
    """
    device, dtype = next(module.parameters()).device, input_dtype(module)
    try:
        with undoing_passes(module), torch.no_grad():
            return form.call(module, [value.to(device, dtype) for value in inputs])
    except LIBRARY_ERRORS as error:  # of the module
        shapes = ", ".join(str(list(value.shape)) for value in inputs)
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} does not run on inputs of shape {shapes}: {describe_error(error)}"
        ) from error


def _predicted_classes(model: HeldModel, inputs: Tensor) -> Tensor:
    with scoring_mode(model, requires_grad=False), torch.no_grad():
        logits: Tensor = model(pixel_values=inputs.to(model.device)).logits
        return logits.argmax(1).cpu()
