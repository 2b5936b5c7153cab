import functools
import json
import logging
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.marks import one_of_each
from helpers.plain_scores import batches_of
from helpers.ranks import call_on_ranks
from helpers.tiny_models import make_base
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import nn

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig
from isoprune_hf.errors import RecipeError
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.groups import ResidualBlock
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.pruning.score import score_with_recipe
from isoprune_hf.pruning.scoring.rank_correlation import correlate_ranks
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.recipes import DATA_CRITERIA, PruneRecipe

ROOT = Path(__file__).parents[3]


def plain_taylor(model, group, batches):
    """Compute scores by one backward pass over all images at once, summing |w g| element by element."""
    model.zero_grad()
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    nn.functional.cross_entropy(model.eval()(images).logits, labels).backward()
    scores = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        parameter = dict(model.model.named_parameters()).get(member.parameter)
        if parameter is None or parameter.grad is None:
            continue
        saliency = (parameter * parameter.grad).abs().detach().double().movedim(member.dim, 0)
        for channel, positions in enumerate(member.index):
            scores[channel] += saliency[positions].sum()
    model.zero_grad()
    return scores.float()


@pytest.mark.parametrize("family", ["vit", "resnet", "swin"])
def test_taylor_equals_one_backward_pass_over_all_images(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    groups = trace_groups(model)
    batches = batches_of(model, [3, 3, 2])
    scores = score_groups(model, groups, criterion="taylor", batches=batches).scores
    for group in groups:
        torch.testing.assert_close(scores[group.name], plain_taylor(model, group, batches), rtol=1e-4, atol=1e-6)


def test_ranking_does_not_depend_on_micro_batch_sizes(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    one = score_groups(model, groups, batches=batches_of(model, [8])).scores
    many = score_groups(model, groups, batches=batches_of(model, [1, 3, 3, 1])).scores
    for group in groups:
        torch.testing.assert_close(one[group.name], many[group.name], rtol=1e-4, atol=1e-7)


def test_l1_and_l2_are_norms_of_channels(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    block = model.model.blocks[0].mlp
    rows = torch.cat([block.fc1.weight, block.fc1.bias[:, None], block.fc2.weight.T], dim=1).detach()
    l1 = score_groups(model, groups, criterion="l1").scores["blocks.0.mlp.fc1"]
    l2 = score_groups(model, groups, criterion="l2").scores["blocks.0.mlp.fc1"]
    torch.testing.assert_close(l1, rows.abs().sum(1))
    torch.testing.assert_close(l2, rows.norm(dim=1))


class NoRegisters(nn.Module):
    """A number of register tokens is a setting, and may be 0: their parameter is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.registers = nn.Parameter(torch.zeros(1, 0, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.first(images.flatten(2))
        return self.last(torch.cat([tokens, self.registers.expand(len(images), -1, -1)], 1).relu().mean(1))


def test_empty_parameters_add_nothing_to_scores() -> None:
    model = HeldModel(IsoPruneConfig(image_size=[3, 2, 3]), NoRegisters())
    first, last = model.model.first, model.model.last
    rows = torch.cat([first.weight, first.bias[:, None], last.weight.T], 1).detach()
    for criterion, wanted in (("l1", rows.abs().sum(1)), ("l2", rows.norm(dim=1))):
        found = score_groups(model, trace_groups(model), criterion=criterion).scores
        torch.testing.assert_close(list(found.values()), [wanted])


def test_random_scores_follow_from_their_seed(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    first, again, other = (score_groups(model, groups, criterion="random", seed=seed).scores for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn"], other["blocks.0.attn"])


def test_scoring_restores_mode_gradients_and_flags(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path).train()
    model.model.fc.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    statistics = model.model.bn1.running_mean.clone()
    score_groups(model, trace_groups(model), batches=batches_of(model, [2]))
    assert all(module.training for module in model.modules())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(statistics, model.model.bn1.running_mean)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_criteria_that_read_images_need_images(criterion: str, precision: str, tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    options = {"criterion": criterion, "precision": precision}
    with pytest.raises(RecipeError, match=f"criterion {criterion} needs data"):
        score_groups(model, trace_groups(model), batches=None, **options)
    with pytest.raises(RecipeError, match="no image"):
        score_groups(model, trace_groups(model), batches=[], **options)


@pytest.mark.parametrize("criterion", [*DATA_CRITERIA, "l1"])
def test_error_names_the_tensor_with_nan(criterion: str, tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    batches = batches_of(model, [2])
    if criterion == "l1":
        model.model.blocks[1].mlp.fc2.bias.data[3] = torch.inf
        what = r"the weights of blocks\.1\.mlp\.fc2\.bias"
    else:
        batches[0][0][1, 0, 3, 3] = torch.nan
        what = r"the calibration images contain nan or inf, first in image 1 of micro-batch 0"
    with pytest.raises(RecipeError, match=what):
        score_groups(model, trace_groups(model), criterion=criterion, batches=batches)


@pytest.mark.parametrize("criterion", one_of_each(DATA_CRITERIA, "gate_fisher_joint", "taylor"))
def test_bf16_reports_rank_correlation_of_first_micro_batch(criterion: str, tmp_path: Path, caplog) -> None:
    model = make_base("vit", tmp_path)
    groups, batches = trace_groups(model), batches_of(model, [5, 3])
    with caplog.at_level(logging.INFO):
        result = score_groups(model, groups, criterion=criterion, batches=iter(batches), precision="bf16")
    half, full = (
        score_groups(model, groups, criterion=criterion, batches=batches[:1], precision=precision).scores
        for precision in ("bf16", "no")
    )
    expected = np.mean([spearmanr(half[group.name], full[group.name]).statistic for group in groups])
    assert result.precision == "bf16" and 0.9 < result.correlation < 1
    exact = criterion != "trial_loss"  # of which some scores differ in float64 alone
    assert result.correlation == pytest.approx(expected, abs=1e-12 if exact else 1e-3)
    assert f"mean rank correlation of {result.correlation:.4f} over 5 groups (5 images)" in caplog.text
    plain = score_groups(model, groups, criterion=criterion, batches=batches)
    assert plain.correlation is None and plain.precision == "no"
    assert not torch.equal(plain.scores["blocks.0.attn"], result.scores["blocks.0.attn"])


def test_rank_correlation_is_that_of_spearman() -> None:
    first = np.array([3.0, 1.0, 4.0, 1.0, 5.0])  # ranks 3, 1.5, 4, 1.5, 5
    assert correlate_ranks(first, first**3) == pytest.approx(1)
    assert correlate_ranks(first, -first) == pytest.approx(-1)
    assert correlate_ranks(first, np.arange(5.0)) == pytest.approx(np.corrcoef([3, 1.5, 4, 1.5, 5], range(5))[0, 1])
    assert np.isnan(correlate_ranks(first, np.ones(5))) and np.isnan(correlate_ranks(np.ones(1), np.ones(1)))


def test_recipe_settings_reach_the_scoring(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    recipe = PruneRecipe(
        criterion="hessian", reduction="mean", score_batchnorm=False, scoring_precision="bf16", ratio=0.3, round_to=1
    )
    result = prune_model(model, recipe, batches_of(model, [2])).scores
    assert (result.criterion, result.reduction) == ("hessian", "mean")
    assert (result.score_batchnorm, result.precision) == (False, "bf16")
    seeded = score_with_recipe(model, PruneRecipe(criterion="random", seed=5), trace_groups(model)).scores
    expected = score_groups(model, trace_groups(model), criterion="random", seed=5).scores
    assert all(torch.equal(seeded[name], score) for name, score in expected.items())


def make_scores(folder: Path) -> ImportanceScores:
    model = make_base("vit", folder)
    block = ResidualBlock("blocks.0", "Block", ("blocks.0.mlp.fc1.weight",))
    return score_groups(
        model,
        trace_groups(model),
        criterion="taylor_l2",
        batches=batches_of(model, [3]),
        sample={"images": 3, "dataset": "abc", "ids": [7, 0, 2**40]},
        reduction="mean",
        score_batchnorm=False,
        precision="bf16",
        blocks=[block],
    )


def test_saved_scores_are_loaded_with_their_record(tmp_path: Path) -> None:
    scores = make_scores(tmp_path)
    scores.save(tmp_path / "scores.safetensors")
    loaded = ImportanceScores.load(tmp_path / "scores.safetensors")
    assert loaded.criterion == "taylor_l2" and loaded.fingerprint == fingerprint(make_base("vit", tmp_path).model)
    assert loaded.sample == {"images": 3, "dataset": "abc", "ids": [7, 0, 2**40]}
    assert (loaded.reduction, loaded.score_batchnorm, loaded.precision) == ("mean", False, "bf16")
    assert loaded.correlation == scores.correlation > 0.9
    assert loaded.blocks == scores.blocks and loaded.blocks["blocks.0"] > 0
    assert set(loaded.versions) == {"torch", "torch-pruning", "timm", "transformers", "isoprune-hf"}
    assert loaded.versions["timm"] == version("timm")
    assert loaded.scores.keys() == scores.scores.keys()
    assert all(torch.equal(loaded.scores[name], value) for name, value in scores.scores.items())


def test_sample_ids_are_stored_as_integers(tmp_path: Path) -> None:
    make_scores(tmp_path).save(tmp_path / "scores.safetensors")
    tensors = load_file(tmp_path / "scores.safetensors")
    assert torch.equal(tensors[".sample.ids"], torch.tensor([7, 0, 2**40]))
    assert tensors[".block.blocks.0"].shape == ()


def test_file_without_scores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"no scores")
    save_file({"a": torch.ones(2)}, tmp_path / "no record")
    for number, record in enumerate(["{", "[" * 100_000]):
        save_file({"a": torch.ones(2)}, tmp_path / f"record {number}", metadata={"isoprune": record})
    for name in ("junk", "nothing", "no record", "record 0", "record 1", "."):
        with pytest.raises(RecipeError, match="not a file of importance scores"):
            ImportanceScores.load(tmp_path / name)


RECORD = {
    "criterion": "l1",
    "fingerprint": "f",
    "sample": {"images": 2},
    "reduction": "sum",
    "score_batchnorm": True,
    "precision": "no",
    "correlation": None,
    "rotated": False,
    "versions": {"torch": "2"},
}
DAMAGES = {
    "list": ({"a": torch.ones(2)}, [], "its record has other entries"),
    "entry gone": ({"a": torch.ones(2)}, {"criterion": "l1"}, "its record has other entries"),
    "entry more": ({"a": torch.ones(2)}, {**RECORD, "more": 1}, "its record has other entries"),
    "criterion": ({"a": torch.ones(2)}, {**RECORD, "criterion": "magic"}, "criterion is 'magic'"),
    "criterion type": ({"a": torch.ones(2)}, {**RECORD, "criterion": ["l1"]}, r"criterion is \"\['l1'\]\""),
    "fingerprint": ({"a": torch.ones(2)}, {**RECORD, "fingerprint": None}, "fingerprint is 'None'"),
    "flag": ({"a": torch.ones(2)}, {**RECORD, "score_batchnorm": 1}, "score_batchnorm is '1'"),
    "number": ({"a": torch.ones(2)}, {**RECORD, "correlation": True}, "correlation is 'True'"),
    "rotated": ({"a": torch.ones(2)}, {**RECORD, "rotated": 0}, "rotated is '0'"),
    "nan": ({"a": torch.ones(2)}, {**RECORD, "correlation": float("nan")}, "correlation is nan"),
    "sample": ({"a": torch.ones(2)}, {**RECORD, "sample": {"images": {}}}, "sample contains values other"),
    "versions": ({"a": torch.ones(2)}, {**RECORD, "versions": {"torch": 2}}, "versions contains values other"),
    "type": ({"a": torch.ones(2).double()}, RECORD, "'a' has the type torch.float64"),
    "dims": ({"a": torch.ones(2, 1)}, RECORD, r"the shape \[2, 1\]"),
    "empty": ({"a": torch.ones(0)}, RECORD, r"the shape \[0\]"),
    "nan score": ({"a": torch.tensor([1, torch.nan])}, RECORD, "'a' contains values that are negative, nan or inf"),
    "inf score": ({"a": torch.tensor([1, torch.inf])}, RECORD, "'a' contains values that are negative, nan or inf"),
    "negative score": ({"a": torch.tensor([1.0, -1])}, RECORD, "'a' contains values that are negative, nan or inf"),
    "block type": ({".block.b": torch.tensor(1.0)}, RECORD, "'.block.b' has the type torch.float32"),
    "block dims": ({".block.b": torch.ones(1).double()}, RECORD, "'.block.b' has the type"),
    "block nan": ({".block.b": torch.tensor(torch.nan).double()}, RECORD, "'.block.b' contains values"),
    "ids type": ({".sample.ids": torch.ones(2)}, RECORD, "'.sample.ids' has the type torch.float32"),
    "name": ({"a\nb" * 500: torch.ones(2).double()}, RECORD, r"has the type torch.float64"),
    "ids negative": ({".sample.ids": torch.tensor([-1])}, RECORD, "'.sample.ids' contains values"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_scores_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    tensors, record, message = DAMAGES[kind]
    path = tmp_path / "scores.safetensors"
    save_file(tensors, path, metadata={"isoprune": json.dumps(record)})
    with pytest.raises(RecipeError, match=rf"importance scores \(.*{message}.*\);") as error:
        ImportanceScores.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250 + len(str(path))


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    ImportanceScores({"a": torch.ones(2)}, "l1", "f", {}).save(path)
    assert torch.equal(ImportanceScores.load(path).scores["a"], torch.ones(2))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RecipeError, match="not a file of importance scores"):
        ImportanceScores.load(path)


def test_one_changed_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    before = fingerprint(model.model)
    assert before == fingerprint(make_base("vit", tmp_path).model)
    with torch.no_grad():
        model.model.blocks[1].mlp.fc2.bias[3] += 1e-6
    assert fingerprint(model.model) != before


def score_shared(folder: Path, accelerator: Accelerator | None = None) -> dict[str, ImportanceScores]:
    """Score on five micro-batches of unequal size, number k on rank k % world."""
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    found = {}
    for family in ("vit", "resnet"):
        model = make_base(family, folder)
        groups, batches = trace_groups(model), batches_of(model, [3, 2, 3, 1, 2])[rank::world]
        for criterion in DATA_CRITERIA:
            options = {"criterion": criterion, "batches": batches, "accelerator": accelerator}
            found[f"{family} {criterion}"] = score_groups(model, groups, **options)
    options = {"criterion": "taylor", "accelerator": accelerator, "precision": "bf16"}
    found["resnet bf16"] = score_groups(model, groups, batches=batches, **options)
    return found


def save_shared(accelerator: Accelerator, folder: Path) -> None:
    for name, scores in score_shared(folder, accelerator).items():
        scores.save(folder / f"{name} {accelerator.process_index}")


@pytest.mark.faults
def test_two_ranks_score_as_one_does(tmp_path: Path) -> None:
    call_on_ranks(functools.partial(save_shared, folder=tmp_path), tmp_path / "log")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    alone = score_shared(tmp_path)
    torch.set_num_threads(threads)
    for name, expected in alone.items():
        for rank in range(2):
            found = ImportanceScores.load(tmp_path / f"{name} {rank}")
            assert found.correlation == expected.correlation
            assert found.scores.keys() == expected.scores.keys()
            for group, scores in expected.scores.items():
                assert torch.equal(found.scores[group], scores), f"{name} {group}"
