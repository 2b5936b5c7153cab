"""The interface of the openers: what an opener takes and returns."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from isoprune_hf.checkpoint.task_forms import IMAGE_CLASSIFICATION, TaskForm
from isoprune_hf.errors import RecipeError
from isoprune_hf.limits import MAX_CONFIG_NUMBER
from isoprune_hf.models.base import BaseModel, default_labels
from isoprune_hf.models.identify import BaseSource


@dataclass(frozen=True)
class LoadOptions:
    """Options of `load_base`, checked.

    Args:
        pretrained: Load trained weights, otherwise draw random ones.
        model_args: Arguments of a timm or torchvision architecture.
        num_labels: Size of a new head; None keeps that of the base.
        label_names: Label names of a new head.
        seed: Seed of random weights.
        tasks: Names of the tasks that a model may be of.

    Raises:
        RecipeError: An option has another type or is out of range.
    """

    pretrained: bool
    model_args: dict[str, Any]
    num_labels: int | None
    label_names: tuple[str, ...] | None
    seed: int
    tasks: Collection[str] = (IMAGE_CLASSIFICATION.task,)

    def takes_as_is(self, form: TaskForm) -> bool:
        """Return whether a network without a head of classes is opened as it is: it may be, and no head is wanted."""
        return form.task in self.tasks and self.num_labels is None

    def check_task(self, place: str, form: TaskForm) -> None:
        """Check that a model of a task may be opened.

        Raises:
            RecipeError: It may not, or a new head is asked for and the task has none.
        """
        if form.task not in self.tasks:
            raise RecipeError(
                f"model: {place} is of the task {form.task}, and this takes {' or '.join(self.tasks)} alone; "
                "docs/tasks.md lists what there is for other tasks"
            )
        if not form.has_classes and self.num_labels is not None:
            raise RecipeError(
                f"model: {place} is of the task {form.task} and has no head of a classifier; leave out "
                "--prune.num_labels, or prune an encoder with it"
            )

    def __post_init__(self) -> None:
        args = self.model_args
        if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
            raise RecipeError(f'prune.model_args must be a mapping such as {{"img_size": 64}}, got {args!r:.99}')
        if "num_classes" in args:
            raise RecipeError("prune.model_args must not contain num_classes; use --prune.num_labels")
        count = self.num_labels
        if count is not None and not (type(count) is int and 1 <= count <= MAX_CONFIG_NUMBER):
            raise RecipeError(f"prune.num_labels must be an integer from 1 to {MAX_CONFIG_NUMBER}, got {count!r:.99}")
        names = self.label_names
        if isinstance(names, str) or not all(isinstance(label, str) for label in names or ()):
            raise RecipeError(f"label_names must be a sequence of strings, got {names!r:.99}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise RecipeError(f"prune.seed must be an integer from 0 to 2^63 - 1, got {self.seed!r:.99}")

    def head_labels(self, count: int) -> tuple[str, ...]:
        """Return the label names of a new head with `count` outputs.

        Raises:
            RecipeError: Another number of names was given.
        """
        if self.label_names is not None and len(self.label_names) != count:
            raise RecipeError(f"prune.num_labels is {count}, but {len(self.label_names)} names were given")
        return tuple(self.label_names or default_labels(count))


class Opener(Protocol):
    """Opens the models of one library."""

    def __call__(self, source: BaseSource, options: LoadOptions) -> BaseModel:
        """Open a model, in eval mode, with its image processor.

        An opener leaves `config.source` None unless it knows the source better than `describe_source`.

        Raises:
            RecipeError: The name is unknown or of another task, or the weights are damaged or cannot be fetched.
        """


def describe_source(source: BaseSource, options: LoadOptions) -> dict[str, Any]:
    """Return the config entry `source`, from which the same base can be opened again, from any working directory."""
    place: dict[str, Any] = {"name": os.path.abspath(source.place) if source.kind == "folder" else source.name}
    if source.revision is not None:
        place["revision"] = source.revision
    return {**place, "pretrained": options.pretrained, "seed": options.seed, "model_args": options.model_args}
