# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""The models that a folder opens as (part of the shipped file)."""

import copy
from typing import Any

import torch
from transformers.utils.generic import can_return_tuple

from isoprune_hf.checkpoint.backbone import IsoPruneBackbone
from isoprune_hf.checkpoint.dense import FORMAT_VERSION, IsoPruneConfig, build_base
from isoprune_hf.checkpoint.difference import (
    SkippedBlock,
    apply_structure,
    check_structure,
    skippable_blocks,
)
from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.checkpoint.outputs import (
    HiddenStates,
    call_classifier,
    call_features,
    call_network,
)
from isoprune_hf.checkpoint.own_network import Builder
from isoprune_hf.checkpoint.plain_values import require
from isoprune_hf.checkpoint.pretrained import PARTS, IsoPrunePreTrainedModel, code_that_ships
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.errors import CheckpointError, ImageError, IsoPruneError

__all__ = [
    "FORMAT_VERSION",
    "MODEL_CLASSES",
    "PARTS",
    "CheckpointError",
    "ImageError",
    "IsoImageProcessor",
    "IsoPruneBackbone",
    "IsoPruneConfig",
    "IsoPruneError",
    "IsoPruneForDepthEstimation",
    "IsoPruneForImageClassification",
    "IsoPruneForObjectDetection",
    "IsoPruneForSemanticSegmentation",
    "IsoPruneForZeroShotImageClassification",
    "IsoPruneModel",
    "SkippedBlock",
    "apply_structure",
    "build_base",
    "check_structure",
    "code_that_ships",
    "model_class_of",
    "skippable_blocks",
]


class IsoPruneForImageClassification(IsoPrunePreTrainedModel):  # type: ignore[no-untyped-call]  # untyped in transformers
    """An image classifier with the architecture `config.base`, changed by `config.structure`.

    Without a structure it is the dense base: base and pruned model share one class, one forward and one label map.
    """

    def __init__(self, config: IsoPruneConfig, builder: Builder | None = None):
        _require_task(config, IsoPruneForImageClassification)
        super().__init__(config, builder)

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
            labels: Targets for the loss that `config.problem_type` names: class indices of shape (B,) for the
                cross-entropy; for multi_label_classification 0 or 1, and for regression numbers, of shape
                (B, num_labels).
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
        # transformers records the problem type that it infers from the first labels; the config stays as it is here.
        loss = self.loss_function(labels, output.logits.float(), copy.copy(self.config))
        return type(output)(**{**output, "loss": loss})


class IsoPruneWithHead(IsoPrunePreTrainedModel):  # type: ignore[no-untyped-call]  # untyped in transformers
    """A network of transformers with the head of its task, changed by `config.structure`."""

    def __init__(self, config: IsoPruneConfig):
        _require_task(config, type(self))
        super().__init__(config)

    @can_return_tuple  # type: ignore[untyped-decorator]  # untyped in transformers
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: Any = None,
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the outputs of the task; see `IsoPruneForImageClassification.forward`.

        Args:
            pixel_values: Images of shape (B, C, H, W), normalised by the image processor of the folder.
            labels: Targets for the loss of the base's class in transformers, if it has one; of segmentation the class
                of each pixel, (B, H, W), without the class `semantic_loss_ignore_index` of the base's config; of
                detection a mapping for each image with `class_labels` (N,) and `boxes` (N, 4).
            output_hidden_states: Whether to return the output of each block.
            output_attentions: Whether to return the attention weights.
            kwargs: Further arguments of the base's own forward, such as `pixel_mask` of detection.

        Returns:
            The output of the base's class in transformers, and `loss` if there are labels. Of segmentation `logits` of
            shape (B, num_labels, h, w), of depth `predicted_depth` of shape (B, h, w), of the resolution that the base
            gives; of detection `logits` and `pred_boxes` (B, queries, 4) of centres and sizes, in shares of the image.
        """
        if labels is not None:
            kwargs["labels"] = labels
        return call_network(
            self.model,
            self._cast(pixel_values),
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            self.config.output_attentions if output_attentions is None else output_attentions,
            **kwargs,
        )


class IsoPruneForSemanticSegmentation(IsoPruneWithHead):  # type: ignore[no-untyped-call]  # untyped in transformers
    """A network that finds the class of every pixel, see `IsoPruneWithHead`."""


class IsoPruneForDepthEstimation(IsoPruneWithHead):  # type: ignore[no-untyped-call]  # untyped in transformers
    """A network that finds the depth of every pixel, see `IsoPruneWithHead`."""


class IsoPruneForObjectDetection(IsoPruneWithHead):  # type: ignore[no-untyped-call]  # untyped in transformers
    """A network that finds boxes of objects and their classes, see `IsoPruneWithHead`."""


class IsoPruneForZeroShotImageClassification(IsoPruneWithHead):  # type: ignore[no-untyped-call]  # untyped in transformers
    """A network that compares images with texts, see `IsoPruneWithHead`; its tower of texts is that of the base."""

    input_modalities = ("image", "text")  # type: ignore[assignment]  # as in the base class

    def __init__(self, config: IsoPruneConfig):
        super().__init__(config)
        # The pipeline of transformers pads the texts of SigLIP, and takes the sigmoid of its logits, by this name. A
        # saved config has the name of its class.
        vars(self.config)["model_type"] = f"{IsoPruneConfig.model_type}_{self.model.config.model_type}"

    def forward(
        self, pixel_values: torch.Tensor | None = None, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Compare images with texts.

        Args:
            pixel_values: Images of shape (B, C, H, W), normalised by the image processor of the folder.
            input_ids: Texts of shape (T, N), by the tokenizer of the folder.
            kwargs: Further arguments of the base's own forward, such as `attention_mask`.

        Returns:
            The output of the base's class in transformers: `logits_per_image` of shape (B, T), `logits_per_text`,
            `image_embeds` of shape (B, C) and `text_embeds`. Without texts `image_embeds` alone.
        """
        return super().forward(pixel_values, input_ids=input_ids, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Return the output of the tower of images, of the base's class in transformers."""
        network: Any = self.model
        return network.get_image_features(self._cast(pixel_values), **kwargs)

    def get_text_features(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """Return the output of the tower of texts, of the base's class in transformers."""
        network: Any = self.model
        return network.get_text_features(input_ids, **kwargs)


class IsoPruneModel(IsoPrunePreTrainedModel):  # type: ignore[no-untyped-call]  # untyped in transformers
    """The features of a network: of a classifier those that its head reads, of an encoder its outputs."""

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
            `pooler_output`; of a tower with a projection `image_embeds`, of a backbone `feature_maps`.
        """
        return call_features(
            self.model,
            self._cast(pixel_values),
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            self.config.output_attentions if output_attentions is None else output_attentions,
            **kwargs,
        )


MODEL_CLASSES: dict[str, type[IsoPrunePreTrainedModel]] = {
    kind.__name__: kind
    for kind in (
        IsoPruneForDepthEstimation,
        IsoPruneForImageClassification,
        IsoPruneForObjectDetection,
        IsoPruneForSemanticSegmentation,
        IsoPruneForZeroShotImageClassification,
        IsoPruneModel,
    )
}  # by name, of which `TaskForm.model_class` is one


def model_class_of(config: IsoPruneConfig) -> type[IsoPrunePreTrainedModel]:
    """Return the class that a folder of the config's task opens as."""
    return MODEL_CLASSES[task_of(config.base).model_class]


def _require_task(config: IsoPruneConfig, kind: type[IsoPrunePreTrainedModel]) -> None:
    """Check that a folder of the config's task opens as a class.

    Raises:
        CheckpointError: It opens as another one.
    """
    form = task_of(config.base)
    require(
        form.model_class == kind.__name__,
        f"config.base.task: the model is of the task {form.task}; open it with {form.auto_class}",
    )
