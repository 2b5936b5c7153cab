"""Prune any module in one call: `prune`."""

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, TimmWrapperForImageClassification

from isoprune_hf.api.batches import InputKeys, read_batches
from isoprune_hf.api.holding import config_of, count_hooks, hold, inner_of, is_ours, share, unwrap
from isoprune_hf.api.objectives import Loss
from isoprune_hf.api.pruned import Pruned
from isoprune_hf.api.random_state import kept_random_state
from isoprune_hf.api.transforms import transformed
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.checkpoint.structure import as_saved
from isoprune_hf.checkpoint.task_forms import TASK_FORMS, task_of
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.images import holds_images, image_batches, open_images
from isoprune_hf.data.labels import adopt_problem, check_problem, classes_of
from isoprune_hf.data.loading import CalibrationBatches
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.models.calling import restore
from isoprune_hf.models.from_module import Recognised, form_without_labels, processor_of, recognise_wrapper
from isoprune_hf.models.held import LABELS
from isoprune_hf.models.processors import with_transform
from isoprune_hf.pruning.plan import record_transform
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import BUDGETS, DATA_CRITERIA, DataRecipe, PruneRecipe

_LOSS_READERS = {*DATA_CRITERIA} - {"activation_variance"}
_OF_NAMES = ("pretrained", "model_args", "num_labels", "weights")  # settings of a model that is a name
_RATIOS = ("ratio", "head_ratio", "head_dim_ratio", "ratios", "remove_blocks", "preset")


def prune(
    model: nn.Module | str | Path | Pruned,
    data: Iterable[Any] | str | Path | DataRecipe | ImageData | None = None,
    *,
    loss: Loss | None = None,
    inputs: InputKeys | None = None,
    processor: BaseImageProcessor | None = None,
    target_macs: str | int | float | None = None,
    **settings: Any,
) -> Pruned:
    """Prune a module to a budget; neither the module nor any state of the caller changes.

    Args:
        model: Any module, or a name or folder that `load_base` opens. The module inside DataParallel,
            DistributedDataParallel and `torch.compile` is taken. Or a result of this function, to prune it further.
        data: Batches for scores and repair, as in the caller's own training loop: a loader, or anything else that
            gives tuples (inputs, targets), dicts with `pixel_values` or `image` and `labels` or `label`, or tensors.
            A tensor is one batch, and a data set of torch is loaded in its order. The first `calibration_batches *
            batch_size` samples are read, once. Or images with labels, of which as many are drawn: rows of `datasets`,
            or a name, folder, `DataRecipe` or the result of `load_data`. For a criterion of weights only, such as l1,
            one tensor is an example of the inputs: nothing is rotated or repaired with it, unless that is named.
        loss: `loss(outputs, batch)` returns the mean over the samples or one value for each sample, where `batch` has
            the form of the data and any number of samples; or cross_entropy, binary_cross_entropy or squared_error.
            By default the one of these that the targets fit. Data without targets are scored on the classes that the
            model itself predicts, or, if its outputs are no (B, classes), on the squares of its outputs. An encoder of
            transformers or timm without a head is scored on its features, whatever the targets.
        inputs: Positions or names of the entries of a batch that the model takes, if there are several; names are
            passed as keywords.
        processor: Makes the inputs of images; by default that of the base, if it is known.
        target_macs: 4.2G, 350M, or a share of the base. Without this, another budget, ratios or a preset: 50%.
        **settings: Settings of `PruneRecipe`, such as `target_params`, `criterion`, `exclude` or `round_to`.

    Returns:
        The pruned module, of the same type and in eval mode, with its plan and costs.

    Raises:
        RecipeError: A setting or the loss does not fit; see also `prune_model`.
        BudgetError: The budget cannot be reached.
        DatasetError: The data have another form, or the targets do not fit the outputs.
        UnsupportedArchitectureError: The module cannot be cut, or does not run on the first batch.
    """
    recipe = _read_recipe(target_macs, settings)
    if data is None:
        raise RecipeError(
            "data is not set: pass batches such as a DataLoader; a criterion of weights only, such as criterion='l1', "
            "needs one tensor of example inputs"
        )
    is_plain = inputs is None and not callable(loss)
    earlier = model if isinstance(model, Pruned) else None
    given = model.model if isinstance(model, Pruned) else model
    module, known = _open(given, recipe, enters_wrapper=is_plain)
    if earlier is not None:
        known = Recognised(copy.deepcopy(earlier.config), earlier.processor)
    maker = processor or (processor_of(module) if known is None else known.processor)
    maker = None if maker is None else transformed(maker, data)
    if recipe.interpolation is not None and not holds_images(data):
        raise RecipeError(
            f"interpolation {recipe.interpolation} is for images of a data set; leave it out for batches"
        )
    is_example = isinstance(data, torch.Tensor) and recipe.reads_images is None
    recipe = recipe.settled(has_images=not is_example)
    samples = recipe.calibration_batches * recipe.batch_size
    reads_targets = loss is not None or recipe.criterion in _LOSS_READERS
    images = open_images(data) if holds_images(data) else None
    is_multi_label = images is not None and images.is_multi_label and form_without_labels(inner_of(module)) is None
    if is_multi_label and recipe.criterion in _LOSS_READERS:
        loss = loss or LABELS.name
    with torch.inference_mode(False), kept_random_state():
        found: Any = data if images is None else _read_images(images, config_of(module, known), maker, recipe)
        batches = read_batches(found, samples=samples, batch_size=recipe.batch_size, keys=inputs)
        held = hold(module, batches, loss, reads_targets=reads_targets, known=known)
        adopt_problem(held.model.config, is_multi_label=is_multi_label)
        result = prune_model(held.model, recipe, [*map(held.read, batches)] if recipe.reads_images else None)
    pruned, config = result.model.model, result.model.config
    restore(pruned)
    plan = dataclasses.replace(result.plan, notes=(*result.plan.notes, *_note_hooks(module, pruned)))
    if isinstance(data, DataRecipe):
        plan = record_transform(plan, data.transform)
    name = held.model.objective.name if reads_targets else None
    return Pruned(
        model=_as_given(given, module, pruned, config),
        plan=plan,
        scores=result.scores,
        groups=result.groups,
        base_cost=result.base_cost,
        pruned_cost=result.pruned_cost,
        seconds=result.seconds,
        loss=name,
        config=config,
        processor=maker if processor is not None or isinstance(data, DataRecipe) else held.processor,
        base=module if earlier is None else earlier.base,
        form=held.form,
    )


def _open(
    model: nn.Module | str | Path, recipe: PruneRecipe, *, enters_wrapper: bool
) -> tuple[nn.Module, Recognised | None]:
    """Return the module to prune, and the config that builds it if that is known.

    Args:
        model: See `prune`.
        recipe: Says how a name is opened.
        enters_wrapper: Take the module of timm out of TimmWrapper, whose inputs and outputs have other forms.
    """
    processor: BaseImageProcessor | None = None
    if recipe.num_labels == "data":
        raise RecipeError("num_labels data is for the command line: pass the number of classes")
    if isinstance(model, nn.Module):
        _check_no_name(recipe)
    else:
        model, processor = load_base(
            str(model),
            recipe.pretrained,
            model_args=recipe.model_args,
            num_labels=recipe.num_labels,
            seed=recipe.seed,
            weights=recipe.weights,
            tasks=TASK_FORMS,
        )
    module = unwrap(model)
    if is_ours(module):
        return module.model, Recognised(copy.deepcopy(module.config), processor)
    if enters_wrapper and isinstance(module, TimmWrapperForImageClassification):
        return inner_of(module), recognise_wrapper(module)
    return module, None


def _check_no_name(recipe: PruneRecipe) -> None:
    """Check that a recipe does not say how a name is opened.

    Raises:
        RecipeError: It does.
    """
    plain = PruneRecipe()
    for name in _OF_NAMES:
        if getattr(recipe, name) != getattr(plain, name):
            raise RecipeError(
                f"{name} {getattr(recipe, name)} says how a name is opened, and the model is a module; leave it out"
            )


def _as_given(
    model: nn.Module | str | Path, module: nn.Module, pruned: nn.Module, config: IsoPruneConfig
) -> nn.Module:
    """Return a pruned module in the form of the model that was given, in eval mode."""
    given = unwrap(model) if isinstance(model, nn.Module) else None
    if given is module:
        return pruned
    if not isinstance(given, TimmWrapperForImageClassification):
        return as_saved(config, pruned)
    wrapper = share(given)
    wrapper.timm_model = pruned
    return wrapper.eval()


def _read_images(
    images: ImageData, config: PreTrainedConfig | None, processor: BaseImageProcessor | None, recipe: PruneRecipe
) -> CalibrationBatches:
    """Return the batches of a data set of images.

    Raises:
        RecipeError: No processor is known.
        DatasetError: There is no training split, or the module does not answer as the images are labelled.
    """
    if processor is None:
        raise RecipeError(
            "processor is not set: the model does not name one; pass the image processor that makes "
            "its inputs, or batches of tensors"
        )
    has_classes = not isinstance(config, IsoPruneConfig) or task_of(config.base).has_classes
    if config is not None and has_classes:
        check_problem(config, is_multi_label=images.is_multi_label)
    return image_batches(
        images,
        with_transform(processor, interpolation=recipe.interpolation),
        batches=recipe.calibration_batches,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        id2label=classes_of(config) if config is not None and has_classes else None,
    )


def _note_hooks(module: nn.Module, pruned: nn.Module) -> tuple[str, ...]:
    left = count_hooks(module) - count_hooks(pruned)
    return (f"hooks left out: {left}, which do not belong to the model itself",) if left > 0 else ()


def _read_recipe(target_macs: str | int | float | None, settings: dict[str, Any]) -> PruneRecipe:
    """Return the recipe of the settings, with a budget of half of the MACs if they name none."""
    is_free = not any(settings.get(name) is not None for name in (*BUDGETS, *_RATIOS))
    try:
        return PruneRecipe(target_macs="50%" if target_macs is None and is_free else target_macs, **settings)
    except TypeError as error:  # an unknown setting
        raise RecipeError(f"prune: {str(error).partition('() ')[2]}; see PruneRecipe for the settings") from error
