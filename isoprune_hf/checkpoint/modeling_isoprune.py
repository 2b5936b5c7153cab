# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""The models that a folder opens as (part of the shipped file)."""

from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from isoprune_hf.checkpoint.dense import FORMAT_VERSION, IsoPruneConfig, build_base
from isoprune_hf.checkpoint.difference import SkippedBlock, apply_structure, check_structure, skippable_blocks
from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.checkpoint.outputs import HiddenStates, call_classifier, call_features
from isoprune_hf.checkpoint.pretrained import PARTS, IsoPrunePreTrainedModel, code_that_ships
from isoprune_hf.errors import CheckpointError, ImageError, IsoPruneError

__all__ = [
    "FORMAT_VERSION",
    "PARTS",
    "CheckpointError",
    "ImageError",
    "IsoImageProcessor",
    "IsoPruneConfig",
    "IsoPruneError",
    "IsoPruneForImageClassification",
    "IsoPruneModel",
    "SkippedBlock",
    "apply_structure",
    "build_base",
    "check_structure",
    "code_that_ships",
    "skippable_blocks",
]


class IsoPruneForImageClassification(IsoPrunePreTrainedModel):  # type: ignore[no-untyped-call]  # untyped in transformers
    """An image classifier with the architecture `config.base`, changed by `config.structure`.

    Without a structure it is the dense base: base and pruned model share one class, one forward and one label map.
    """

    @can_return_tuple  # type: ignore[untyped-decorator]  # untyped in transformers
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Classify images.

        Args:
            pixel_values: Images of shape (B, C, H, W), normalised by the image processor of the folder.
            labels: Class indices of shape (B,) for the cross-entropy loss.
            output_hidden_states: Whether to return the output of each block; for bases of timm also the indices of
                some blocks.
            output_attentions: Whether to return the attention weights; only for bases of transformers.
            kwargs: Further arguments of the base's own forward, such as `interpolate_pos_encoding`.

        Returns:
            The output of the base's class in transformers: `logits` of shape (B, num_labels), and `loss` if there are
            labels.

        Raises:
            TypeError: The base has no such argument.
            ValueError: The base cannot return its hidden states or attentions.
        """
        output: Any = call_classifier(
            self.model,
            self._cast(pixel_values),
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            self.config.output_attentions if output_attentions is None else output_attentions,
            **kwargs,
        )
        if labels is None:
            return output
        loss = nn.functional.cross_entropy(output.logits.float(), labels)
        return type(output)(**{**output, "loss": loss})


class IsoPruneModel(IsoPrunePreTrainedModel):  # type: ignore[no-untyped-call]  # untyped in transformers
    """The same network without its classification: the features that its head reads."""

    @can_return_tuple  # type: ignore[untyped-decorator]  # untyped in transformers
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute features of images; see `IsoPruneForImageClassification.forward`.

        Returns:
            The output of the base's class in transformers: `last_hidden_state` and, as the base has it,
            `pooler_output`.
        """
        return call_features(
            self.model,
            self._cast(pixel_values),
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            self.config.output_attentions if output_attentions is None else output_attentions,
            **kwargs,
        )
