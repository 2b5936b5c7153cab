"""Open a base model with the head that is asked for: `load_base`."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from isoprune_hf.checkpoint.difference import run_once
from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.structure import is_cut, meta_copy
from isoprune_hf.checkpoint.task_forms import IMAGE_CLASSIFICATION
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models.base import BaseModel
from isoprune_hf.models.from_isoprune import open_isoprune
from isoprune_hf.models.from_timm import open_timm
from isoprune_hf.models.from_torchvision import open_torchvision
from isoprune_hf.models.from_transformers import open_transformers
from isoprune_hf.models.head import log_new_head, replace_head
from isoprune_hf.models.identify import Library, identify
from isoprune_hf.models.opener import LoadOptions, Opener, describe_source
from isoprune_hf.models.processors import processed_size
from isoprune_hf.models.weights import open_with_weights
from isoprune_hf.recipes.values import ONE_CLASS, ProblemType

OPENERS: dict[Library, Opener] = {
    "timm": open_timm,
    "torchvision": open_torchvision,
    "transformers": open_transformers,
    "isoprune": open_isoprune,
}


def load_base(
    name: str,
    pretrained: bool = True,
    *,
    model_args: dict[str, Any] | None = None,
    num_labels: int | None = None,
    label_names: tuple[str, ...] | None = None,
    problem_type: ProblemType | None = None,
    seed: int = 0,
    weights: str | Path | None = None,
    revision: str | None = None,
    tasks: Collection[str] = (IMAGE_CLASSIFICATION.task,),
) -> BaseModel:
    """Open a base model and its image processor.

    Args:
        name: `timm/NAME` or a bare timm name, `torchvision/NAME`, a Hub id of transformers or timm, or a local folder
            of isoprune_hf, transformers or timm.
        pretrained: Load trained weights. If false, weights are drawn from `seed`; timm, torchvision and folders then
            need no network.
        model_args: Arguments of a timm or torchvision architecture without its trained weights, such as
            {"img_size": 64}.
        num_labels: Size of a new head, drawn from `seed`; None keeps the head of the base.
        label_names: Names of the classes of a new head.
        problem_type: With `label_names`, the problem type of the new head in transformers; by default each image has
            one of the classes.
        seed: Seed of random weights; the global random state is not changed.
        weights: File with the trained weights, in place of those of `name`: a state dict as safetensors or of
            torch.save, possibly inside a checkpoint. Nothing in it is executed. The head has the size of the one in
            the file.
        revision: Commit, branch or tag of a Hub repository.
        tasks: Tasks that the caller works with. With image-feature-extraction among them, an encoder without a head
            is opened as it is if no head is asked for.

    Returns:
        The model in eval mode, and its image processor.

    Raises:
        RecipeError: The name is unknown, is of another task, or needs a network that cannot be reached.
        CheckpointError: A saved model or image processor is damaged.
        UnsupportedArchitectureError: The model cannot be rebuilt from a config, or reads tokens.
    """
    args = {} if model_args is None else model_args
    options = LoadOptions(pretrained, args, num_labels, label_names, seed, tasks)
    source = identify(name, revision)
    if options.model_args and source.kind != "architecture":
        raise RecipeError(
            f"prune.model_args is only for names of timm and torchvision; the architecture of {source.name} is saved"
        )
    if weights is not None and not pretrained:
        raise RecipeError("prune.weights are trained weights: remove --prune.pretrained false")
    if weights is None:
        base = OPENERS[source.library](source, options)
    else:
        base = open_with_weights(source, options, weights, OPENERS[source.library])
    if base.model.config.source is None:
        base.model.config.source = describe_source(source, options)
    _check_processor(source.name, base)
    known = base.model.config.problem_type
    is_same_problem = label_names is None or known in (None, problem_type or ONE_CLASS)
    # Trained weights know classes of their own; random ones take any names.
    is_named = pretrained or label_names is None or tuple((base.model.config.id2label or {}).values()) == label_names
    if num_labels is None or (num_labels == base.model.config.num_labels and is_same_problem and is_named):
        return _with_fingerprint(base)
    problem = (known or problem_type) if is_same_problem else problem_type
    headed = replace_head(base, options.head_labels(num_labels), seed=seed, problem=problem)
    if pretrained and not is_cut(headed.model.config):
        log_new_head(headed)
    return _with_fingerprint(headed)


def _with_fingerprint(base: BaseModel) -> BaseModel:
    """Record the weights that were opened in the config of a dense base, in place, and return the base."""
    config = base.model.config
    if not is_cut(config):
        config.source = {**(config.source or {}), "fingerprint": fingerprint(base.model.model)}
    return base


def _check_processor(name: str, base: BaseModel) -> None:
    """Check that the image processor produces images that the model takes."""
    size = processed_size(name, base.processor)
    if size == base.model.config.image_size:
        return
    try:  # convolutional models take other sizes, too
        run_once(meta_copy(base.model).model, [(None, size)])
    except CheckpointError as error:
        raise RecipeError(f"model: the image processor of {name} does not fit the model: {error}") from error
