"""The preset `reference` compared with torch-pruning's own pruner, tensor for tensor."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.marks import one_of_each
from helpers.plain_scores import batches_of
from helpers.plans import group, plan_for
from helpers.reference_pruner import prune_with_torch_pruning, seeded_gradients
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.deciding.reference import threshold_counts
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.pruning.score import score_with_recipe
from isoprune_hf.pruning.scoring.criteria import taylor
from isoprune_hf.pruning.scoring.criteria.reference import scored_by_reference
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe

# Deeper than the tiny bases, so that classes hold several groups.
DEEP = {
    "vit": ("timm/vit_tiny_patch16_224", {**tiny_models.VIT, "depth": 4, "init_values": 0.1}),
    "convnext": ("timm/convnext_atto", {"depths": [2, 2, 3, 1], "dims": [16, 24, 32, 40], "conv_mlp": False}),
    "resnet": ("timm/resnet50", {"layers": [2, 2, 3, 2], "channels": [8, 16, 24, 32], "stem_width": 16}),
}
HEADS = {"head_ratio": 0.4, "head_dim_ratio": 0.3}
PUBLISHED = {
    "timm/deit_small_distilled_patch16_224": {"ratio": 0.5, "head_ratio": 0.5, "head_dim_ratio": 0.1},
    "timm/convnext_tiny": {"ratio": 0.25},
    "timm/resnet50": {"ratio": 0.26},
}


@pytest.fixture
def deep(tmp_path, monkeypatch):
    def make(family: str):
        monkeypatch.setitem(tiny_models.TIMM, family, DEEP.get(family, tiny_models.TIMM[family]))
        return make_base(family, tmp_path)

    return make


class Compared:
    """One model with given gradients, pruned by the preset `reference` and by torch-pruning."""

    def __init__(self, model, gradients, monkeypatch, *, round_to: int | None, **ratios: float):
        monkeypatch.setattr(
            taylor, "mean_gradients", lambda _, names, *rest: {name: gradients[name] for name in names}
        )
        recipe = PruneRecipe(preset="reference", round_to=round_to or 1, **ratios)
        groups = trace_groups(model, recipe.signature)
        scores = score_with_recipe(model, recipe, groups, Calibration(()))
        self.plan = make_plan(groups, scores, recipe)
        self.ours = apply_plan(model, self.plan, groups).model.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network, self.heads = prune_with_torch_pruning(model, gradients, round_to=round_to, **ratios)
        self.theirs = network.state_dict()
        assert self.ours.keys() == self.theirs.keys()
        self.cut = [name for name, tensor in model.model.state_dict().items() if tensor.shape != self.ours[name].shape]
        self.unequal = [name for name in self.ours if not torch.equal(self.ours[name], self.theirs[name])]


@pytest.mark.parametrize("round_to", [None, 2])
@pytest.mark.parametrize(("ratio", "seed"), [(0.3, 0), pytest.param(0.5, 1, marks=pytest.mark.families)])
@pytest.mark.parametrize("family", one_of_each(["vit", "deit", "convnext", "resnet", "mobilenet_v2"], "vit", "resnet"))
def test_reference_preset_keeps_tensors_of_torch_pruning(
    family: str, ratio: float, seed: int, round_to: int | None, deep, monkeypatch
) -> None:
    model = deep(family)
    heads = HEADS if family in ("vit", "deit") else {}
    found = Compared(model, seeded_gradients(model, seed), monkeypatch, ratio=ratio, round_to=round_to, **heads)
    assert found.unequal == [] and found.plan.notes == ()
    assert len(found.cut) > len(found.ours) / 2
    if heads:
        assert {name: len(kept) for name, kept in found.plan.heads.items()} == found.heads
        assert sum(found.heads.values()) < 4 * len(found.heads)


def test_reference_preset_equals_torch_pruning_on_image_gradients(deep, monkeypatch) -> None:
    model = deep("vit")
    batches = batches_of(model, [4, 4])
    for images, labels in batches:
        nn.functional.cross_entropy(model(pixel_values=images).logits, labels).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.model.named_parameters()}
    model.zero_grad()
    ours = prune_model(model, PruneRecipe(preset="reference", ratio=0.5, round_to=2, **HEADS), batches).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network, heads = prune_with_torch_pruning(model, gradients, ratio=0.5, round_to=2, **HEADS)
    theirs = network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.model.state_dict().items())
    assert {name: ours.model.get_submodule(name).num_heads for name in heads} == heads


@pytest.mark.parametrize("round_to", [None, 4])
def test_equal_scores_leave_together_as_in_torch_pruning(round_to: int | None, deep, monkeypatch) -> None:
    model = deep("vit")
    gradients = seeded_gradients(model, 0)
    for block in range(4):  # 70 of the 128 hidden channels are worth 0, and 10 % of all shall leave
        gradients[f"blocks.{block}.mlp.fc1.weight"][10:80] = 0
        gradients[f"blocks.{block}.mlp.fc2.weight"][:, 10:80] = 0
    found = Compared(model, gradients, monkeypatch, ratio=0.1, round_to=round_to)
    assert found.unequal == []
    assert {len(found.plan.kept[f"blocks.{block}.mlp.fc1"]) for block in range(4)} == {58 - 58 % (round_to or 1)}


def test_only_layer_left_dense_by_torch_pruning_differs(deep, monkeypatch) -> None:
    model = deep("resnet")
    found = Compared(model, seeded_gradients(model, 0), monkeypatch, ratio=0.5, round_to=4)
    spared = ["layer1.0.conv1", "layer1.0.conv2"]
    assert [note.split()[0] for note in found.plan.notes] == spared
    assert all("below the threshold whole" in note for note in found.plan.notes)
    for name in spared:
        assert len(found.theirs[f"{name}.weight"]) == 8 and len(found.ours[f"{name}.weight"]) == 4
    touched = ("layer1.0.conv1.", "layer1.0.bn1.", "layer1.0.conv2.", "layer1.0.bn2.", "layer1.0.conv3.weight")
    assert found.unequal and all(name.startswith(touched) for name in found.unequal)


def test_torch_pruning_may_shuffle_channels_of_layer_norm(deep, monkeypatch) -> None:
    model = deep("convnext")
    found = Compared(model, seeded_gradients(model, 0), monkeypatch, ratio=0.7, round_to=2)
    assert found.unequal and all(
        "norm" in name or "stem.1" in name or "downsample.0" in name for name in found.unequal
    )
    for name in found.unequal:
        assert torch.equal(found.ours[name].sort().values, found.theirs[name].sort().values), name


@pytest.mark.families
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_models_equal_torch_pruning(name: str, monkeypatch) -> None:
    model = load_base(name, False, seed=0).model
    found = Compared(model, seeded_gradients(model, 0), monkeypatch, round_to=2, **PUBLISHED[name])
    assert found.unequal == [] and found.plan.notes == ()
    assert {name: len(kept) for name, kept in found.plan.heads.items()} == found.heads
    assert len(found.cut) > len(found.ours) / 2


# The choices one by one, by hand

ATTENTION = [group("x", "attn", 6, num_heads=2)]


def test_threshold_removes_ties_and_truncates_counts() -> None:
    units = {"a": np.array([1.0, 2, 2, 5]), "b": np.array([2.0, 3, 4, 6])}
    # Half of 8 is the fourth lowest, 2: three channels worth 2 and the one worth 1 leave.
    assert threshold_counts(units, {"a": 1, "b": 1}, 0.5) == ({"a": 1, "b": 3}, {"removed": 2.0, "kept": 3.0})
    # A quarter asks for two and takes four, since the second lowest is 2, too.
    assert threshold_counts(units, {"a": 1, "b": 1}, 0.25)[0] == {"a": 1, "b": 3}
    # 1000 x (1 - 0.8) is 199.99999999999997.
    assert threshold_counts({"a": np.arange(1000.0)}, {"a": 1}, 0.8)[0] == {"a": 199}
    assert threshold_counts(units, {"a": 1, "b": 1}, 0.0) == ({"a": 4, "b": 4}, None)
    assert threshold_counts(units, {"a": 1, "b": 1}, 1.0) == ({"a": 0, "b": 0}, None)


def test_threshold_pool_omits_unprunable_groups() -> None:
    units = {"a": np.arange(4.0), "b": np.arange(4.0)}
    assert threshold_counts(units, {"a": 4, "b": 1}, 0.5)[0] == {"a": 4, "b": 2}
    assert threshold_counts(units, {"a": 4, "b": 4}, 0.5) == ({"a": 4, "b": 4}, None)


def test_rounding_down_gives_nothing_back() -> None:
    groups = [group("a", "s", 8), group("b", "s", 8)]
    scores = {"a": [1, 2, 3, 13, 14, 15, 16, 17], "b": [4, 20, 21, 22, 23, 24, 25, 26]}
    kept = {name: len(left) for name, left in plan_for(scores, groups, ratio=0.25, round_to=4).kept.items()}
    assert kept == {"a": 4}  # 5 and 7 stay: 12 of 16 as 4 and 8
    kept = plan_for(scores, groups, ratio=0.25, round_to=4, rounding="down").kept
    assert {name: len(left) for name, left in kept.items()} == {"a": 4, "b": 4}


def test_shared_dims_may_count_removed_heads() -> None:
    # Head 0 leaves. Head 1 alone would drop its dim 1; by the mean of both, 4.5, 3, 2.5, it is dim 2.
    options = {"head_ratio": 0.5, "head_dim_ratio": 1 / 3}
    scores = {"x": [3, 4, 0, 6, 2, 5]}
    assert plan_for(scores, ATTENTION, head_dims="shared", **options).kept == {"x": (3, 5)}
    assert plan_for(scores, ATTENTION, head_dims="shared_all", **options).kept == {"x": (3, 4)}


def test_attention_entirely_below_threshold_keeps_best_head() -> None:
    attention = [group("x", "attn", 4, num_heads=2), group("y", "attn", 4, num_heads=2)]
    scores = {"x": [1, 1, 2, 2], "y": [3, 3, 4, 4]}
    plan = plan_for(scores, attention, head_ratio=0.5, head_dim_ratio=0.0, selection="threshold")
    assert plan.heads == {"x": (1,)}
    assert plan.notes == (
        "x is below the threshold whole and keeps its best; torch-pruning 1.6.1 would not cut it at all",
    )


def test_only_linears_convolutions_and_layer_norms_count(tmp_path) -> None:
    base = make_base("convnext", tmp_path).model
    counted = scored_by_reference(base, dict(base.named_parameters()))
    assert {name for name in counted if name.startswith("stages.0.")} == {
        "stages.0.blocks.0.norm.weight",
        "stages.0.blocks.0.mlp.fc1.weight",
        "stages.0.blocks.0.mlp.fc2.weight",
    }
    base = make_base("resnet", tmp_path).model
    counted = scored_by_reference(base, dict(base.named_parameters()))
    assert {name for name in counted if name.startswith("layer1.")} == {
        *(f"layer1.0.conv{number}.weight" for number in (1, 2, 3)),
        "layer1.0.downsample.0.weight",
    }


# The preset as a setting


def test_preset_fills_defaults_and_survives_replace() -> None:
    recipe = PruneRecipe(preset="reference", ratio=0.3, normalizer="mean")
    assert (recipe.criterion, recipe.head_dims, recipe.selection) == ("taylor_reference", "shared_all", "threshold")
    assert (recipe.rounding, recipe.min_keep, recipe.ratio, recipe.round_to) == ("down", 1, 0.3, 8)
    assert replace(recipe, round_to=2) == PruneRecipe(preset="reference", ratio=0.3, round_to=2)
    assert (
        PruneRecipe(criterion="taylor").selection == "exact" and PruneRecipe(criterion="taylor").rounding == "balanced"
    )
    assert PruneRecipe(criterion="taylor").replaced_by_preset() == {}
    assert recipe.replaced_by_preset() == {
        "criterion": (None, "taylor_reference"),
        "score_batchnorm": (True, False),
        "reduction": ("sum", "mean"),
        "normalizer": (None, "mean"),
        "allocation": (None, "class"),
        "engine": ("axes", "torch-pruning"),
        "head_dims": ("per_head", "shared_all"),
        "selection": ("exact", "threshold"),
        "rounding": ("balanced", "down"),
        "min_keep": (2, 1),
        "max_ratio": (None, 1.0),
        "rotate": (None, False),
        "reconstruct": (None, "none"),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"criterion": "l1"}, "takes prune.criterion taylor_reference, got l1"),
        ({"normalizer": "max"}, "takes prune.normalizer mean, got max"),
        ({"head_dims": "shared"}, "takes prune.head_dims shared_all, got shared"),
        ({"steps": 2}, "takes prune.steps 1, got 2"),
        ({"target_macs": "50%"}, "takes prune.target_macs None, got 50%"),
    ],
)
def test_value_that_contradicts_preset_is_refused(values, message: str) -> None:
    with pytest.raises(RecipeError, match=f"prune.preset reference {message}"):
        PruneRecipe(preset="reference", **values)


def test_unknown_preset_and_other_scores_are_refused(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"prune\.preset .*best, paper, reference, .*'good'"):
        PruneRecipe(preset="good")
    model = make_base("resnet", tmp_path)
    recipe, batches = PruneRecipe(preset="reference", round_to=1), batches_of(model, [4])
    for options, message in (
        ({"criterion": "l1"}, r"takes criterion taylor_reference, .* were made with l1"),
        ({"criterion": "taylor"}, r"takes criterion taylor_reference, .* were made with taylor"),
    ):
        scores = score_groups(model, trace_groups(model), batches=batches, **options)
        with pytest.raises(RecipeError, match=message):
            prune_model(model, recipe, scores=scores)
    scores = score_with_recipe(model, recipe, trace_groups(model), Calibration(batches))
    assert prune_model(model, recipe, scores=scores).plan.settings["criterion"] == "taylor_reference"
