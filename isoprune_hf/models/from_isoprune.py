"""Open a folder or Hub repository that isoprune_hf wrote."""

import os
from typing import Any

from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import MODEL_CLASSES
from isoprune_hf.checkpoint.structure import is_cut
from isoprune_hf.checkpoint.task_forms import TaskForm, task_of
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models.base import BaseModel, hold_unlabelled, single_line
from isoprune_hf.models.head import redraw_weights
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions, describe_source
from isoprune_hf.models.saved_processor import saved_processor

_ATTEMPTS = 20


def open_isoprune(source: BaseSource, options: LoadOptions) -> BaseModel:
    """Open a dense or pruned model; only a dense one can be given random weights.

    Raises:
        RecipeError: The folder cannot be opened, or random weights are asked for a pruned model.
        CheckpointError: The folder is damaged.
    """
    form = task_of(source.config.get("base"))
    options.check_task(source.place, form)
    model, processor = _read_folder(source, form)
    known = model.config.source or {}
    if is_cut(model.config):
        model.config.source = known  # also an empty one: a pruned folder is not its own base
    elif known.get("fingerprint") != fingerprint(model.model):  # trained since it was opened there
        model.config.source = describe_source(source, options)
    base = BaseModel(model, processor)
    if options.pretrained:
        return base
    if is_cut(model.config):
        raise RecipeError(f"model: {source.place} is pruned; random weights need a dense base")
    labels = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
    return redraw_weights(base, labels, seed=options.seed)


def _read_folder(source: BaseSource, form: TaskForm) -> tuple[Any, BaseImageProcessor]:
    """Read model and processor; a folder that is replaced meanwhile is read again, since its files belong together.

    Raises:
        RecipeError: The folder cannot be opened.
        CheckpointError: The folder is damaged, or replaced again and again.
    """
    for _ in range(_ATTEMPTS):
        before = _identify(source.place)
        try:
            kind: Any = MODEL_CLASSES[form.model_class]
            model = kind.from_pretrained(source.place, revision=source.revision or "main")
            model = model if form.has_classes else hold_unlabelled(model.config, model.model)
            model.eval()
            processor = saved_processor(source.place, source.revision)
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # the first is what transformers raises for a missing file
            if _identify(source.place) != before:
                continue
            if isinstance(error, OSError):
                raise RecipeError(f"model: {source.place} cannot be opened: {single_line(error)}") from error
            raise
        if _identify(source.place) == before:
            return model, processor
    raise CheckpointError(f"{source.place} was replaced {_ATTEMPTS} times while it was read; open it again")


def _identify(place: str) -> tuple[int, int] | None:
    """Return number and time of change of a folder; None for a name of the Hub."""
    try:
        status = os.stat(place)
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns
