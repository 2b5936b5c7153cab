"""The result of `prune`: `Pruned`."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import BaseImageProcessor, ProcessorMixin

from isoprune_hf.api.holding import inner_of
from isoprune_hf.api.program import save_program
from isoprune_hf.api.saving import describe_builder, describe_inputs, save_module
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.own_network import Builder
from isoprune_hf.errors import CheckpointError
from isoprune_hf.hub.push import push_folder
from isoprune_hf.models.calling import CallForm
from isoprune_hf.pruning.cost.macs import ModelCost
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.reporting.result_text import describe_result


@dataclass(frozen=True, eq=False, repr=False)
class Pruned:
    """The result of `prune`; its `repr` is a table of costs and widths.

    Args:
        model: The pruned module, of the type of the module that was given, in eval mode.
        plan: The channels that were kept, with costs and notes.
        scores: The scores that the plan was made from.
        groups: The coupled groups of the base.
        base_cost: Cost of the base.
        pruned_cost: Cost of `model`.
        seconds: Wall seconds of trace, rotate, score, solve, cut and repair.
        loss: Name of the loss that the scores are of; None for scores that need no loss.
        config: Config of the pruned model; its entry `base` is None if no library builds the module.
        processor: Image processor of the base, if it is known.
        base: The dense module: the one that was given, or that of the result that was pruned further.
        form: The inputs of `model`.
    """

    model: nn.Module
    plan: PruningPlan
    scores: ImportanceScores
    groups: tuple[CoupledGroup, ...]
    base_cost: ModelCost
    pruned_cost: ModelCost
    seconds: Mapping[str, float]
    loss: str | None
    config: IsoPruneConfig
    processor: BaseImageProcessor | None
    base: nn.Module
    form: CallForm

    def __repr__(self) -> str:
        """Return MACs, parameters and widths before and after, the loss, and the notes of the plan."""
        table = describe_result(type(self.model).__name__, self.base_cost, self.pruned_cost, self.groups, self.plan)
        return table if self.loss is None else f"{table}\nscored by {self.scores.criterion} of {self.loss}"

    def save(
        self,
        folder: str | Path,
        processor: BaseImageProcessor | ProcessorMixin | None = None,
        *,
        builder: Builder | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the folder that `from_pretrained` opens, with the weights that `model` has now.

        Of a module of no library, without `builder`, the folder has a program of `torch.export` beside the weights,
        which `from_pretrained` does not open.

        Args:
            folder: Folder to write; the folder of a model is replaced.
            processor: Image processor; by default that of the base, if it is known. Of a network that reads texts
                the processor of images and texts, whose tokenizer is written, too.
            builder: Class of the module, or a function that returns it, if it is not one of timm, torchvision or
                transformers. A program that opens the folder passes it again: `from_pretrained(folder, builder=...)`.
            arguments: Arguments of the builder, by name: text, numbers, None, and lists and mappings of these.

        Raises:
            CheckpointError: The module can neither be rebuilt nor traced, or computes other outputs after it was.
            RecipeError: The folder holds other files than a model; another program cannot import the builder, or it
                does not build the base.
        """
        config = copy.deepcopy(self.config)
        if builder is not None:
            base = describe_builder(builder, arguments, self.model, (config.cost or {})["base"]["params"])
            config.base = {**base, **describe_inputs(self.form), "num_labels": config.num_labels}
            config.image_size = [*self.form.shapes[0]]
        if config.base is None:
            save_program(folder, self.model, self.form, self.plan)
            return
        save_module(
            folder, inner_of(self.model), config, self.processor if processor is None else processor, self.plan
        )

    def push_to_hub(
        self, repo: str, processor: BaseImageProcessor | ProcessorMixin | None = None, **options: Any
    ) -> str:
        """Save the model and upload its folder in one commit; return the address of the commit.

        Args:
            repo: `user/name`.
            processor: See `save`.
            **options: `builder` and `arguments` of `save`, and `private`, `revision`, `tag`, `create_pr`, `collection`
                and `message` for the commit.

        Raises:
            CheckpointError: The module cannot be rebuilt, see `save`.
            HubError: No login, no permission, or no network.
        """
        if self.config.base is None and options.get("builder") is None:
            raise CheckpointError(
                f"push_to_hub: pass the class or function that builds {type(self.model).__name__} as builder=, with "
                "its arguments; a program of torch.export is not pushed"
            )
        saving = {name: options.pop(name) for name in ("builder", "arguments") if name in options}
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / repo.rpartition("/")[2]
            self.save(folder, processor, **saving)
            return push_folder(folder, repo, needs_processor=False, **options)
