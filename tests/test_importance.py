from pathlib import Path

import pytest
import torch
from tiny_models import make_base, make_images
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.graph import trace_groups
from isoprune_hf.pruning.importance import ImportanceScores, fingerprint, score_groups


def batches_of(model, sizes, seed=3):
    images = make_images(model, sum(sizes), seed)
    labels = torch.arange(sum(sizes)) % 7
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def plain_taylor(model, group, batches):
    """One backward pass over all images at once, then |w g| summed element by element."""
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


def test_the_split_into_micro_batches_does_not_change_the_ranking(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    one = score_groups(model, groups, batches=batches_of(model, [8])).scores
    many = score_groups(model, groups, batches=batches_of(model, [1, 3, 3, 1])).scores
    for group in groups:
        torch.testing.assert_close(one[group.name], many[group.name], rtol=1e-4, atol=1e-7)


def test_l1_and_l2_are_norms_over_all_elements_of_a_channel(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    block = model.model.blocks[0].mlp
    rows = torch.cat([block.fc1.weight, block.fc1.bias[:, None], block.fc2.weight.T], dim=1).detach()
    l1 = score_groups(model, groups, criterion="l1").scores["blocks.0.mlp.fc1"]
    l2 = score_groups(model, groups, criterion="l2").scores["blocks.0.mlp.fc1"]
    torch.testing.assert_close(l1, rows.abs().sum(1))
    torch.testing.assert_close(l2, rows.norm(dim=1))


def test_random_scores_are_those_of_their_seed(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    groups = trace_groups(model)
    first, again, other = (score_groups(model, groups, criterion="random", seed=seed).scores for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn"], other["blocks.0.attn"])


def test_scoring_leaves_mode_gradients_and_flags_alone(tmp_path: Path) -> None:
    model = make_base("resnet", tmp_path).train()
    model.model.fc.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    statistics = model.model.bn1.running_mean.clone()
    score_groups(model, trace_groups(model), batches=batches_of(model, [2]))
    assert all(module.training for module in model.modules())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(statistics, model.model.bn1.running_mean)


@pytest.mark.parametrize("batches", [None, []])
def test_taylor_without_data_is_refused(batches, tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    with pytest.raises(RecipeError, match="criterion taylor needs"):
        score_groups(model, trace_groups(model), criterion="taylor", batches=batches)


def test_saved_scores_come_back_with_their_record(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    scores = score_groups(model, trace_groups(model), criterion="l1", sample={"images": 3})
    scores.save(tmp_path / "scores.safetensors")
    loaded = ImportanceScores.load(tmp_path / "scores.safetensors")
    assert (loaded.criterion, loaded.sample, loaded.fingerprint) == ("l1", {"images": 3}, fingerprint(model.model))
    assert loaded.scores.keys() == scores.scores.keys()
    assert all(torch.equal(loaded.scores[name], value) for name, value in scores.scores.items())


def test_a_file_without_scores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"no scores")
    for name in ("junk", "nothing"):
        with pytest.raises(RecipeError, match="is no file of importance scores"):
            ImportanceScores.load(tmp_path / name)


def test_the_fingerprint_sees_one_changed_weight(tmp_path: Path) -> None:
    model = make_base("vit", tmp_path)
    before = fingerprint(model.model)
    assert before == fingerprint(make_base("vit", tmp_path).model)
    with torch.no_grad():
        model.model.blocks[1].mlp.fc2.bias[3] += 1e-6
    assert fingerprint(model.model) != before
