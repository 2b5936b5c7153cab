"""Open a folder or Hub repository that isoprune_hf wrote."""

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import is_cut
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.base import BaseModel, single_line
from isoprune_hf.models.head import redraw_weights
from isoprune_hf.models.identify import BaseSource
from isoprune_hf.models.opener import LoadOptions, describe_source
from isoprune_hf.models.saved_processor import saved_processor


def open_isoprune(source: BaseSource, options: LoadOptions) -> BaseModel:
    """Open a dense or pruned model; only a dense one can be given random weights.

    Raises:
        RecipeError: The folder cannot be opened, or random weights are asked for a pruned model.
        CheckpointError: The folder is damaged.
    """
    try:
        model = IsoPruneForImageClassification.from_pretrained(source.place, revision=source.revision or "main")
    except OSError as error:
        raise RecipeError(f"model: {source.place} cannot be opened: {single_line(error)}") from error
    known = model.config.source or {}
    if is_cut(model.config):
        model.config.source = known  # also an empty one: a pruned folder is not its own base
    elif known.get("fingerprint") != fingerprint(model.model):  # trained since it was opened there
        model.config.source = describe_source(source, options)
    base = BaseModel(model, saved_processor(source.place, source.revision))
    if options.pretrained:
        return base
    if is_cut(model.config):
        raise RecipeError(f"model: {source.place} is pruned; random weights need a dense base")
    labels = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
    return redraw_weights(base, labels, seed=options.seed)
