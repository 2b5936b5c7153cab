"""Rotated heads: the same function, few dims that carry most, and a cut that keeps the attention scale."""

import itertools
from pathlib import Path

import pytest
import torch
from helpers import grouped_query
from helpers.command_line import refuse
from helpers.masking import masked_base
from helpers.plain_cut import PLAIN
from helpers.plain_scores import Batches, batches_of
from helpers.tiny_models import VIT, make_base, make_images
from helpers.traced_models import make_timm
from timm.models.vision_transformer import VisionTransformer

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.cutting.replay import replay_plan
from isoprune_hf.pruning.doctor import check_replay
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.pruning.repairing import rotation
from isoprune_hf.pruning.repairing.attention_scale import keep_scale
from isoprune_hf.pruning.repairing.rotation import Rotated, rotate_heads
from isoprune_hf.pruning.score import score_model
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import PruneRecipe

Model = IsoPruneForImageClassification
ATTENTIONS = ["vit", "deit", "swin", "hf-vit", "hf-deit", "hf-swin"]
HEADS = {"criterion": "l1", "reconstruct": "none", "round_to": 1, "min_keep": 1}
TURNED = {"criterion": "taylor", "ratio": 0.5, "round_to": 1, "rotate": True, "reconstruct": "none"}


def logits(model: Model, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def random_model(model: Model) -> Model:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def turned(model: Model, batches: Batches) -> Rotated:
    return rotate_heads(model, trace_groups(model), batches)


@pytest.mark.parametrize("family", ATTENTIONS)
def test_rotated_heads_compute_the_same(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotated, images = turned(model, batches_of(model, [4, 2])), make_images(model, 3, seed=8)
    groups = [group for group in trace_groups(model) if group.num_heads]
    assert [(pair.group.name, pair.kind) for pair in rotated.pairs] == [
        (group.name, kind) for group in groups for kind in ("values", "queries and keys")
    ]
    assert rotated.notes == ()
    assert_same(logits(rotated.model, images), logits(model, images), 1e-5)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    changed = [name for name, value in rotated.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and not any("mlp" in name or "patch" in name or "norm" in name for name in changed)


def watch(model: Model, layers: dict[str, str], batches: Batches) -> dict[str, torch.Tensor]:
    """Return the outputs of layers, or the inputs of those with `<` before the name: (N, features) in float64."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = []
    for name, layer in layers.items():

        def look(module, args, output, name=name, layer=layer) -> None:
            found[name].append((args[0] if layer.startswith("<") else output).double())

        hooks.append(model.model.get_submodule(layer.removeprefix("<")).register_forward_hook(look))
    for images, _ in batches:
        logits(model, images)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values).flatten(0, -2) for name, values in found.items()}


def queries_and_keys(family: str, model: Model, batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys of the second attention: (4 heads, N, 8 dims) each."""
    if family == "vit":
        both = watch(model, {"qkv": "blocks.1.attn.qkv"}, batches)["qkv"]
        queries, keys, _ = both.chunk(3, dim=-1)
    else:
        layers = {kind: f"vit.layers.1.attention.{kind}_proj" for kind in "qk"}
        queries, keys = watch(model, layers, batches).values()
    return tuple(side.unflatten(-1, (4, 8)).transpose(0, 1) for side in (queries, keys))


@pytest.mark.parametrize("family", ["vit", "hf-vit"])
def test_queries_and_keys_share_a_diagonal_moment(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    batches = batches_of(model, [8, 4])
    queries, keys = queries_and_keys(family, turned(model, batches).model, batches)
    assert queries.shape[0] == 4 and queries.shape[2] == 8
    for query, key in zip(queries, keys, strict=True):
        moments = query.T @ query, key.T @ key
        largest = float(moments[0].max())
        torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-3 * largest)
        torch.testing.assert_close(moments[0], moments[0].diag().diag(), rtol=1e-3, atol=1e-3 * largest)
        assert (moments[0].diag().diff() <= 1e-3 * largest).all()
    before, _ = queries_and_keys(family, model, batches)
    moment = before[0].T @ before[0]
    assert (moment - moment.diag().diag()).abs().max() > 1e-2 * moment.max()


def test_values_and_readers_share_a_diagonal_moment(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    batches = batches_of(model, [8, 4])
    rotated = turned(model, batches).model
    given = watch(rotated, {"heads": "<blocks.1.attn.proj"}, batches)["heads"].unflatten(-1, (4, 8)).transpose(0, 1)
    weights = rotated.model.blocks[1].attn.proj.weight.detach().double().unflatten(1, (4, 8)).transpose(0, 1)
    for values, weight in zip(given, weights, strict=True):
        moments = values.T @ values, weight.T @ weight
        largest = float(moments[0].max())
        torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-3 * largest)
        assert (moments[0] - moments[0].diag().diag()).abs().max() < 1e-3 * largest
        assert (moments[0].diag().diff() <= 1e-3 * largest).all()


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_first_dims_approximate_the_product_best(rank: int, tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    batches = batches_of(model, [6])
    after = queries_and_keys("vit", turned(model, batches).model, batches)
    before = queries_and_keys("vit", model, batches)
    for head in range(4):
        product = before[0][head] @ before[1][head].T
        query, key = (side[head][:, :rank] for side in after)
        found = float((product - query @ key.T).norm())
        for dims in itertools.combinations(range(8), rank):
            query, key = (side[head][:, list(dims)] for side in before)
            assert found <= float((product - query @ key.T).norm()) * (1 + 1e-4)
        # The optimum is known: the norm of the other singular values.
        rest = torch.linalg.svdvals(product)[rank:].norm()
        assert found == pytest.approx(float(rest), rel=1e-2)


def test_norms_of_queries_and_keys_prevent_rotation() -> None:
    model = load_base("timm/vit_tiny_patch16_224", False, model_args={**VIT, "qk_norm": True}, num_labels=7).model
    rotated = turned(model, batches_of(model, [2]))
    assert "queries and keys" not in [pair.kind for pair in rotated.pairs]
    assert rotated.notes[0].startswith("not rotated, queries and keys: 2 attentions (2: norms, positions or other")
    result = prune_model(model, PruneRecipe(**HEADS, rotate=True), batches_of(model, [2]))
    assert set(rotated.notes) <= set(result.plan.notes)


def test_rotary_positions_prevent_rotation() -> None:
    args = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}
    model = random_model(make_timm("eva02_tiny_patch14_224", 32, img_size=32, **args))
    rotated = turned(model, batches_of(model, [4]))
    assert rotated.pairs == () and rotated.model is model


def test_queries_with_shared_keys_are_rotated_together() -> None:
    model = grouped_query.make_model()
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = [(images, torch.arange(8) % 7)]
    rotated = turned(model, batches)
    assert [pair.kind for pair in rotated.pairs] == ["values", "queries and keys"] * 2
    assert_same(logits(rotated.model, images), logits(model, images), 1e-9)
    names = {"queries": "blocks.1.attn.q_proj", "keys": "blocks.1.attn.k_proj"}
    found = watch(rotated.model, names, batches)
    queries = found["queries"].unflatten(-1, (2, 3, 4)).permute(1, 0, 2, 3).flatten(1, 2)  # three heads share one
    keys = found["keys"].unflatten(-1, (2, 4)).transpose(0, 1)
    for query, key in zip(queries, keys, strict=True):
        moments = query.T @ query, key.T @ key
        largest = float(moments[0].max())
        torch.testing.assert_close(moments[0], moments[1], rtol=1e-4, atol=1e-4 * largest)
        assert (moments[0] - moments[0].diag().diag()).abs().max() < 1e-4 * largest


def test_rotation_without_attention_or_images() -> None:
    model = load_base("timm/resnet10t", False, num_labels=7).model
    note = "prune.rotate changes nothing: the model has no attention heads that can be cut"
    assert rotate_heads(model, trace_groups(model), []) == Rotated(model, (), (note,))
    vit = load_base("timm/vit_tiny_patch16_224", False, model_args=VIT, num_labels=7).model
    with pytest.raises(RecipeError, match=r"no image: prune\.rotate"):
        turned(vit, [])


@pytest.mark.parametrize("broken", ["nan", "inf", "singular"])
def test_attention_that_cannot_be_rotated_stays(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base("vit", tmp_path)
    batches, moments = batches_of(model, [4, 2]), rotation._moments

    def damaged(*args: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = moments(*args)
        values = {"nan": torch.nan, "inf": torch.inf, "singular": 1e-320}
        found[0][0][1] = values[broken]  # the second head of the first pair
        return found

    monkeypatch.setattr(rotation, "_moments", damaged)
    rotated = turned(model, batches)
    names = [(pair.group.name, pair.kind) for pair in rotated.pairs]
    assert names == [
        *(("blocks.0.attn", "queries and keys"), ("blocks.1.attn", "values"), ("blocks.1.attn", "queries and keys"))
    ]
    assert len(rotated.notes) == 1 and rotated.notes[0].startswith("not rotated, values: 1 attention (1: ")
    images = make_images(model, 3, seed=8)
    assert_same(logits(rotated.model, images), logits(model, images), 1e-5)


def test_network_that_makes_float32_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base("vit", tmp_path)
    batches, images = batches_of(model, [4]), make_images(model, 3, seed=8)
    usual, embed = turned(model, batches), VisionTransformer._pos_embed
    monkeypatch.setattr(VisionTransformer, "_pos_embed", lambda self, x: embed(self, x).float())
    rotated = turned(model, batches)  # it does not run in float64
    assert [(pair.group.name, pair.kind) for pair in rotated.pairs] == [
        (pair.group.name, pair.kind) for pair in usual.pairs
    ]
    assert_same(logits(rotated.model, images), logits(model, images), 1e-5)


def test_image_with_nan_is_refused(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    batches = batches_of(model, [2])
    batches[0][0][0, 0, 0, 0] = torch.nan
    with pytest.raises(RecipeError, match="first in image 0 of micro-batch 0"):
        turned(model, batches)


def test_rotation_that_rounding_spoils_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base("vit", tmp_path)
    basis = rotation._basis
    calls = []

    def distorted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        found = basis(left, right)
        return found if len(calls) > 1 or found is None else found * torch.logspace(-9, 9, found.shape[-1])

    monkeypatch.setattr(rotation, "_basis", distorted)
    rotated = turned(model, batches_of(model, [4]))
    images = make_images(model, 3, seed=8)
    assert_same(logits(rotated.model, images), logits(model, images), 1e-3)
    assert len(rotated.pairs) == 3 and len(rotated.notes) == 1


@pytest.mark.parametrize("family", ["vit", "deit", "hf-vit", "swin"])
def test_cut_attention_equals_rotated_one_with_zeroed_dims(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    batches = batches_of(model, [4, 2])
    groups = trace_groups(model)
    names = [group.name for group in groups if group.num_heads]
    recipe = PruneRecipe(**HEADS, ratio=0.5, head_ratio=0.25, include=names, rotate=True)
    result = prune_model(model, recipe, batches)
    assert result.plan.kept.keys() == set(names)
    rotated = turned(model, batches).model.double()
    parameters = dict(rotated.model.named_parameters())
    with torch.no_grad():
        for group in groups:
            leaving = [c for c in range(group.channels) if c not in result.plan.kept.get(group.name, range(10**6))]
            for member in group.members:
                places = torch.from_numpy(member.index[leaving].reshape(-1))
                parameters[member.parameter].index_fill_(member.dim, places, 0)
    images = make_images(model, 3, seed=8)
    expected = logits(rotated, images.double())
    assert_same(logits(result.model, images).double(), expected, 1e-4)
    assert not torch.allclose(expected.float(), logits(model, images), rtol=1e-2, atol=1e-2)


def test_attention_scale_is_unchanged_without_rotation(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path).double()
    groups = trace_groups(model)
    plan = PruningPlan({"blocks.0.attn": tuple(range(0, 32, 2))}, {"blocks.0.attn": (0, 1, 2, 3)})
    pruned = apply_plan(model, plan, groups)
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    assert keep_scale(Rotated(model, (), ()), pruned, plan, groups) == {}
    assert all(torch.equal(pruned.state_dict()[name], value) for name, value in before.items())
    images = make_images(model).double()
    assert_same(logits(pruned, images), logits(masked_base(model, groups, plan), images), 1e-9)


@pytest.mark.parametrize("family", ["vit", "deit", "swin", "hf-vit"])
def test_fused_and_eager_attention_agree_after_the_cut(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    recipe = PruneRecipe(**HEADS, ratio=0.5, rotate=True)
    pruned = prune_model(model, recipe, batches_of(model, [4])).model
    images, found = make_images(model), []
    for is_fused in (True, False):
        if family == "hf-vit":
            pruned.model.set_attn_implementation("sdpa" if is_fused else "eager")
        else:
            switched = [module for module in pruned.modules() if hasattr(module, "fused_attn")]
            assert switched
            for module in switched:
                module.fused_attn = is_fused
        found.append(logits(pruned, images))
    assert_same(found[0], found[1], 1e-5)


def test_rotated_heads_lose_less_when_cut(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    batches, images = batches_of(model, [16]), make_images(model, 8, seed=8)
    options = {**PLAIN, "criterion": "gate_fisher", "round_to": 1, "ratio": 0.5, "include": ["blocks.*.attn"]}
    errors = [
        float(
            (
                logits(prune_model(model, PruneRecipe(**{**options, "rotate": turn}), batches).model, images) - dense
            ).norm()
        )
        for dense in [logits(model, images)]
        for turn in (False, True)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Batches, PruneResult]:
    model = make_base("vit", tmp_path_factory.mktemp("base"))
    batches = batches_of(model, [4])
    return (
        model,
        batches,
        prune_model(model, PruneRecipe(**TURNED), batches),
    )


def test_scores_record_that_heads_were_rotated(made: tuple[Model, Batches, PruneResult], tmp_path: Path) -> None:
    model, batches, result = made
    recipe = PruneRecipe(**TURNED)
    scores = score_model(model, recipe, batches)
    assert scores.rotated and scores.fingerprint == fingerprint(model.model)
    scores.save(tmp_path / "scores.safetensors")
    scores = ImportanceScores.load(tmp_path / "scores.safetensors")
    assert scores.rotated
    again = prune_model(model, recipe, batches, scores=scores)
    assert again.plan.kept == result.plan.kept
    assert all(torch.equal(again.model.state_dict()[n], value) for n, value in result.model.state_dict().items())
    plain = PruneRecipe(**{**TURNED, "rotate": False})
    with pytest.raises(RecipeError, match=r"with prune\.rotate"):
        prune_model(model, plain, scores=scores)
    unturned = score_model(model, plain, batches)
    assert not unturned.rotated and not torch.equal(unturned.scores["blocks.0.attn"], scores.scores["blocks.0.attn"])
    with pytest.raises(RecipeError, match=r"without prune\.rotate"):
        prune_model(model, recipe, batches, scores=unturned)
    with pytest.raises(RecipeError, match=r"prune\.rotate needs data"):
        prune_model(model, recipe, scores=scores)
    with pytest.raises(RecipeError, match=r"prune\.rotate iterates"):
        prune_model(model, recipe, iter(batches))


def test_plan_of_rotated_heads_cannot_be_replayed(made: tuple[Model, Batches, PruneResult], tmp_path: Path) -> None:
    model, _, result = made
    assert result.plan.settings["rotate"] is True and result.plan.fingerprint == fingerprint(model.model)
    with pytest.raises(CheckpointError, match="rotated heads"):
        replay_plan(model, result.plan)
    finding = check_replay(result.model, model, result.plan)
    assert finding == ("tensors", "skip", "prune.rotate changed the weights that the plan keeps, as it records")
    path = tmp_path / "plan.json"
    path.write_text(result.plan.to_json())
    base = ["--model", "timm/vit_tiny_patch16_224", "--prune.pretrained", "false", "--prune.num_labels", "7"]
    line = refuse("plan", "apply", path, *base, "--output", tmp_path / "out")
    assert "rotated heads" in line and not (tmp_path / "out").exists()


def test_doctor_names_every_setting_that_changed_weights(made: tuple[Model, Batches, PruneResult]) -> None:
    model, batches, _ = made
    options = {**PLAIN, "criterion": "l1", "ratio": 0.5, "round_to": 1}
    both = prune_model(model, PruneRecipe(**{**options, "rotate": True, "reconstruct": "bias"}), batches)
    text = "prune.rotate and prune.reconstruct changed the weights that the plan keeps, as it records"
    assert check_replay(both.model, model, both.plan) == ("tensors", "skip", text)
    fitted = prune_model(model, PruneRecipe(**{**options, "reconstruct": "least_squares"}), batches)
    finding = check_replay(fitted.model, model, fitted.plan)
    assert finding.verdict == "skip" and finding.text.startswith("prune.reconstruct changed")
    plain = prune_model(model, PruneRecipe(**options), batches)
    assert check_replay(plain.model, model, plain.plan).verdict == "ok"


def test_repaired_plan_is_replayed_without_the_repair(made: tuple[Model, Batches, PruneResult], caplog) -> None:
    model, batches, _ = made
    options = {**PLAIN, "criterion": "l1", "ratio": 0.5, "round_to": 1}
    fitted = prune_model(model, PruneRecipe(**{**options, "reconstruct": "least_squares"}), batches)
    plain = prune_model(model, PruneRecipe(**options)).model.state_dict()
    replayed, _ = replay_plan(model, fitted.plan)
    assert "repaired after the cut (prune.reconstruct least_squares)" in caplog.text
    assert all(torch.equal(replayed.state_dict()[name], value) for name, value in plain.items())
    assert any(not torch.equal(fitted.model.state_dict()[name], value) for name, value in plain.items())
