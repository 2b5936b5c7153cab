# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""Call a base network as its stock class in transformers is called (part of the shipped file).

`call_classifier` and `call_features` return the outputs of transformers, for the networks of all three libraries;
`call_network` returns those of a network of transformers with the head of its task.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import ModelOutput, TransformersKwargs

from isoprune_hf.checkpoint.task_forms import IMAGE_FEATURE_EXTRACTION, networks_of

# True, or the indices of the blocks, which only networks of timm select.
HiddenStates = bool | Sequence[int] | None
# Arguments by which an encoder of transformers returns its stages as its backbone does, before their downsampling.
_STAGE_SETTINGS = ("always_partition", "output_hidden_states_before_downsampling")


def call_classifier(
    network: nn.Module,
    pixel_values: torch.Tensor,
    hidden_states: HiddenStates,
    attentions: bool | None,
    **options: Any,
) -> ModelOutput:
    """Return an output with `logits` and, as requested, `hidden_states` and `attentions`.

    Args:
        network: A classifier of transformers, timm or torchvision.
        pixel_values: Images of shape (B, C, H, W).
        hidden_states: Whether to return the output of each block.
        attentions: Whether to return the attention weights.
        options: Further arguments of the network's own forward.

    Raises:
        TypeError: The network has no such argument.
        ValueError: The network cannot return the hidden states or the attentions.
    """
    if isinstance(network, PreTrainedModel):
        output = _call_transformers(network, pixel_values, hidden_states, attentions, options)
        if isinstance(output, ModelOutput) and {"logits", "loss"} <= vars(output).keys():
            return output
        # The first entry, whatever its name (PP-LCNet has another one).
        states = {name: getattr(output, name, None) for name in ("hidden_states", "attentions")}
        return ImageClassifierOutput(logits=output[0], **states)
    _check_requests(network, hidden_states, attentions)
    if not hidden_states:
        found = network(pixel_values, **options)
        return ImageClassifierOutput(logits=_first_of(found))
    timm_network: Any = network
    last, states = timm_network.forward_intermediates(pixel_values, **_selected(hidden_states), **options)
    return ImageClassifierOutput(logits=timm_network.forward_head(last), hidden_states=tuple(states))


def call_network(
    network: nn.Module,
    pixel_values: torch.Tensor,
    hidden_states: HiddenStates,
    attentions: bool | None,
    **options: Any,
) -> ModelOutput:
    """Return the output of the network's own class in transformers.

    Args and errors are those of `call_classifier`; `labels` among the options are the targets of the network's loss.
    A `pixel_mask`, which image processors of detection make, is left out where the network has no use for it.
    """
    if "pixel_mask" not in inspect.signature(network.forward).parameters:
        options.pop("pixel_mask", None)
    return _call_transformers(cast(Any, network), pixel_values, hidden_states, attentions, options)


def call_features(
    network: nn.Module,
    pixel_values: torch.Tensor,
    hidden_states: HiddenStates,
    attentions: bool | None,
    **options: Any,
) -> ModelOutput:
    """Return the output of an encoder, or what the head of a classifier reads.

    It has `last_hidden_state` and, as the base has it, `pooler_output`; of backbones `feature_maps`.

    Args and errors are those of `call_classifier`.
    """
    if isinstance(network, PreTrainedModel):
        return _call_transformers(_encoder_of(network), pixel_values, hidden_states, attentions, options)
    _check_requests(network, hidden_states, attentions)
    if not hasattr(network, "forward_features"):
        raise ValueError(f"{type(network).__name__} has no method forward_features, which returns features")
    timm_network: Any = network
    if hidden_states:
        last, states = timm_network.forward_intermediates(pixel_values, **_selected(hidden_states), **options)
    else:
        last, states = timm_network.forward_features(pixel_values, **options), None
    pooled = timm_network.forward_head(last, pre_logits=True)
    return BaseModelOutputWithPooling(
        last_hidden_state=last, pooler_output=pooled, hidden_states=None if states is None else tuple(states)
    )


def call_stages(network: nn.Module, pixel_values: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Return the feature maps (B, C, H, W) of all stages by name, in their order.

    The stages of timm are those of its `feature_info`; those of transformers are its hidden states, named stem,
    stage1, ... as in its backbones, without the norms that some of these add untrained. Tokens of patches become maps.
    Of a backbone they are those that it returns.

    Raises:
        ValueError: The network has no stages that are maps.
    """
    unknown = f"{type(network).__name__} does not return feature maps of its stages"
    if isinstance(network, PreTrainedModel):
        base = _encoder_of(network)
        if isinstance(base, BackboneMixin):
            chosen: Any = _call_transformers(cast(Any, base), pixel_values, None, None, options)
            return dict(zip(base.out_features, chosen.feature_maps, strict=True))
        taken = inspect.signature(base.encoder.forward).parameters if hasattr(base, "encoder") else {}
        of_stages = {name: True for name in _STAGE_SETTINGS if name in taken}
        output: Any = _call_transformers(base, pixel_values, True, None, options, **of_stages)
        states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states or ()
        found = [_as_map(state, pixel_values, getattr(network.config, "patch_size", None)) for state in states]
        if not found or any(state is None for state in found):
            raise ValueError(unknown)
        return {
            f"stage{number}" if number else "stem": cast(torch.Tensor, state) for number, state in enumerate(found)
        }
    info = getattr(network, "feature_info", None)
    if info is None or not hasattr(network, "forward_intermediates"):
        raise ValueError(unknown)
    timm_network: Any = network
    maps = timm_network.forward_intermediates(pixel_values, intermediates_only=True, **options)
    return {stage["module"]: found for stage, found in zip(info, maps, strict=True)}


def _encoder_of(network: PreTrainedModel) -> Any:
    """Return an encoder itself, which may hold an inner one, and of a network with a head its encoder."""
    is_encoder = type(network) in networks_of(IMAGE_FEATURE_EXTRACTION, type(network.config))
    return network if is_encoder else network.base_model


def _as_map(state: torch.Tensor, images: torch.Tensor, patch: Any) -> torch.Tensor | None:
    """Return a hidden state as (B, C, H, W): itself, or the tokens (B, N, C) of its patches, the last ones of each.

    Args:
        state: The hidden state.
        images: The images (B, C, H, W).
        patch: Side of a patch, or both sides.

    Returns:
        None if it has neither of the forms.
    """
    if state.ndim == 4:
        return state
    sides = patch if isinstance(patch, list | tuple) else (patch, patch)
    if state.ndim != 3 or len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    height, width = images.shape[2] // sides[0], images.shape[3] // sides[1]
    others = state.shape[1] - height * width  # tokens of classes
    return state[:, others:].mT.reshape(len(state), -1, height, width) if others >= 0 else None


def _call_transformers(
    network: PreTrainedModel,
    pixel_values: torch.Tensor,
    hidden_states: HiddenStates,
    attentions: bool | None,
    options: dict[str, Any],
    **settings: bool,
) -> ModelOutput:
    # Many classes of transformers ignore an unknown argument.
    parameters = inspect.signature(network.forward).parameters
    known = parameters.keys() | TransformersKwargs.__annotations__.keys()
    for name in options:
        if name not in known:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    if hidden_states:
        options = {**options, "output_hidden_states": True}
    if attentions:
        options = {**options, "output_attentions": True}
    if "return_dict" in parameters or any(found.kind is found.VAR_KEYWORD for found in parameters.values()):
        options = {**options, "return_dict": True}
    output: ModelOutput = network(pixel_values, **options, **settings)
    return output


def _check_requests(network: nn.Module, hidden_states: HiddenStates, attentions: bool | None) -> None:
    name = type(network).__name__
    if attentions:
        raise ValueError(f"output_attentions: {name} does not return them; only bases of transformers do")
    if hidden_states and not hasattr(network, "forward_intermediates"):
        raise ValueError(f"output_hidden_states: {name} has no forward_intermediates, which returns them")


def _first_of(output: Any) -> Any:
    """Return the tensor of an output, or of several the one that is named logits or the first one."""
    if isinstance(output, Mapping):
        return output.get("logits", next(iter(output.values())))
    return output if isinstance(output, torch.Tensor) else output[0]


def _selected(hidden_states: HiddenStates) -> dict[str, Any]:
    return {} if isinstance(hidden_states, bool) or hidden_states is None else {"indices": list(hidden_states)}
