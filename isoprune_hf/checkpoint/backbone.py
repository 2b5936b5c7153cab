# Copyright 2026 the isoprune_hf authors. Licensed under the Apache License, Version 2.0.
"""The backbone that a folder opens as (part of the shipped file): `IsoPruneBackbone`."""

from typing import Any

import torch
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from isoprune_hf.checkpoint.dense import IsoPruneConfig
from isoprune_hf.checkpoint.difference import build_pruned
from isoprune_hf.checkpoint.meta import move_to_meta
from isoprune_hf.checkpoint.outputs import call_stages
from isoprune_hf.checkpoint.pretrained import IsoPrunePreTrainedModel


class IsoPruneBackbone(IsoPrunePreTrainedModel):  # type: ignore[no-untyped-call]  # untyped in transformers
    """The same network as the backbone of a detector or segmenter: the feature maps of some of its stages.

    `out_features` (names) or `out_indices` of `from_pretrained` select stages; without them the last one is returned,
    and of a base that is a backbone all that it returns.
    """

    def __init__(self, config: IsoPruneConfig):
        super().__init__(config)
        with torch.device("meta"):
            image = torch.zeros(1, *(config.image_size or []))
            maps = call_stages(move_to_meta(build_pruned(config)).eval(), image)
        self.stage_names = [*maps]
        self.num_features = [found.shape[1] for found in maps.values()]
        self.out_indices = self._choose_stages()

    @property
    def out_features(self) -> list[str]:
        """The names of the stages that are returned."""
        return [self.stage_names[index] for index in self.out_indices]

    @property
    def channels(self) -> list[int]:
        """The number of channels of each feature map."""
        return [self.num_features[index] for index in self.out_indices]

    def _choose_stages(self) -> list[int]:
        """Return the indices of the stages that the config asks for, in their order.

        Raises:
            ValueError: There is no such stage.
        """
        count, wanted = len(self.stage_names), self.config.out_features
        default = [*range(count)] if isinstance(self.model, BackboneMixin) else [count - 1]
        chosen = [self.stage_names.index(name) if name in self.stage_names else count for name in wanted or ()]
        chosen = chosen or [index + count if index < 0 else index for index in self.config.out_indices or default]
        if not all(0 <= index < count for index in chosen):
            raise ValueError(
                f"out_features or out_indices: {wanted or self.config.out_indices} are no stages; there are "
                f"{self.stage_names}"
            )
        return sorted(chosen)

    @can_return_tuple  # type: ignore[untyped-decorator]  # untyped in transformers
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """Compute the feature maps (B, C, H, W) of the selected stages, as `feature_maps`.

        Args:
            pixel_values: Images of shape (B, C, H, W).
            kwargs: Further arguments of the base's own forward.
        """
        maps = call_stages(self.model, self._cast(pixel_values), **kwargs)
        selected: Any = tuple(maps[name] for name in self.out_features)
        return BackboneOutput(feature_maps=selected)
