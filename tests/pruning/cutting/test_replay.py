"""Plans from files: unsuitable ones are refused, and a replay gives the same model again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_base

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.errors import CheckpointError
from isoprune_hf.pruning.cutting.replay import replay_plan
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.recipes import PruneRecipe

HALF = PruneRecipe(criterion="l1", ratio=0.5, head_ratio=0.25, round_to=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    return make_base("vit", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def result(base) -> PruneResult:
    return prune_model(base, HALF)


def test_replay_gives_bit_equal_tensors_and_same_plan(base, result: PruneResult) -> None:
    again, plan = replay_plan(base, PruningPlan.from_json(result.plan.to_json()))
    assert plan.to_json() == result.plan.to_json()
    tensors = result.model.state_dict()
    assert again.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    for name in ("structure", "cost", "stage", "source"):
        assert getattr(again.config, name) == getattr(result.model.config, name)
    # By hand: rows of fc1 are those of its channels, columns those of the stream.
    rows, columns = (list(plan.kept[name]) for name in ("blocks.0.mlp.fc1", "patch_embed.proj"))
    by_hand = base.model.blocks[0].mlp.fc1.weight[rows][:, columns]
    assert torch.equal(again.model.blocks[0].mlp.fc1.weight, by_hand)


def test_other_weights_are_refused_unless_fingerprint_is_ignored(result: PruneResult, tmp_path: Path) -> None:
    other = make_base("vit", tmp_path)
    with torch.no_grad():
        other.model.head.bias[0] += 1
    with pytest.raises(CheckpointError, match=r"--ignore_fingerprint true") as caught:
        replay_plan(other, result.plan)
    assert result.plan.fingerprint[:12] in str(caught.value) and fingerprint(other.model)[:12] in str(caught.value)
    pruned, plan = replay_plan(other, result.plan, ignore_fingerprint=True)
    assert plan.fingerprint == pruned.config.source["fingerprint"] == fingerprint(other.model)
    assert (plan.kept, plan.achieved) == (result.plan.kept, result.plan.achieved)
    assert torch.equal(pruned.model.head.bias, other.model.head.bias)


def test_a_plan_without_a_fingerprint_is_refused_too(base, result: PruneResult) -> None:
    with pytest.raises(CheckpointError, match="fingerprint none"):
        replay_plan(base, replace(result.plan, fingerprint=""))


def test_edited_plan_is_cut_and_costed_as_edited(base, result: PruneResult) -> None:
    name = "blocks.1.mlp.fc1"
    edited = replace(result.plan, kept={**result.plan.kept, name: (0, 5, 9)})
    pruned, plan = replay_plan(base, edited)
    assert pruned.model.blocks[1].mlp.fc1.out_features == 3
    params = sum(parameter.numel() for parameter in pruned.parameters())
    assert plan.achieved["pruned"]["params"] == params < result.plan.achieved["pruned"]["params"]
    assert plan.achieved["base"] == result.plan.achieved["base"]


def test_heads_of_what_is_no_attention_are_refused(base, result: PruneResult) -> None:
    name = "blocks.1.mlp.fc1"
    with pytest.raises(CheckpointError, match=f"heads names '{name}'"):
        replay_plan(base, replace(result.plan, heads={**result.plan.heads, name: (0,)}))


def test_what_does_not_fit_the_model_is_refused(base, result: PruneResult) -> None:
    kept = result.plan.kept
    for entry, words in (
        ({"blocks.7.mlp.fc1": (0, 1)}, "no group 'blocks.7.mlp.fc1'"),
        ({"blocks.1.mlp.fc1": (0, 128)}, "ascending channels from 0 to 127"),
        ({"blocks.1.attn": kept["blocks.1.attn"][:-1]}, "the same number of dims in each of its heads"),
    ):
        with pytest.raises(CheckpointError, match=words):
            replay_plan(base, replace(result.plan, kept={**kept, **entry}))


def test_plan_is_read_from_file_and_folder(result: PruneResult, tmp_path: Path) -> None:
    (tmp_path / "pruning_plan.json").write_text(result.plan.to_json())
    assert PruningPlan.load(tmp_path) == PruningPlan.load(str(tmp_path / "pruning_plan.json")) == result.plan


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for parent in parents:
            values = values[parent]
        values[last] = value

    return change


BAD_ENTRIES = {
    "version": (_set("version", 99), "version 99"),
    "no kept": (lambda values: values.pop("kept"), "not a plan"),
    "kept is a list": (_set("kept", [1]), "kept must map names to indices"),
    "kept of nothing": (_set("kept/blocks.0.attn", []), "kept of blocks.0.attn must be a non-empty list"),
    "kept of a text": (_set("kept/blocks.0.attn", "12"), "kept of blocks.0.attn must be a non-empty list"),
    "kept of fractions": (_set("kept/blocks.0.attn", [0.5]), "kept of blocks.0.attn must be a non-empty list"),
    "kept of true": (_set("kept/blocks.0.attn", [True]), "kept of blocks.0.attn must be a non-empty list"),
    "below zero": (_set("kept/blocks.0.attn", [-1, 2]), "kept of blocks.0.attn must be a non-empty list"),
    "descending": (_set("kept/blocks.0.mlp.fc1", [3, 2]), "kept of blocks.0.mlp.fc1 must be ascending"),
    "twice": (_set("kept/blocks.0.mlp.fc1", [3, 3]), "kept of blocks.0.mlp.fc1 must be ascending, each number once"),
    "heads": (_set("heads/blocks.0.attn", [1, 0]), "heads of blocks.0.attn must be ascending"),
    "heads alone": (_set("heads/blocks.9.attn", [0]), "heads names 'blocks.9.attn'"),
    "blocks": (_set("removed_blocks", [1]), "removed_blocks must be a list of texts"),
    "notes": (_set("notes", [{}]), "notes must be a list of texts"),
    "achieved": (_set("achieved", 3), "achieved must map names to figures"),
    "a cost": (_set("achieved/base/macs", "many"), "achieved of base: macs must be a number, got 'many'"),
    "margins": (_set("margins", {"all": 1}), "margins of all must map names to figures"),
    "a margin": (_set("margins", {"all": {"kept": "x"}}), "margins of all: kept must be a number"),
    "settings": (_set("settings", []), "settings must map names to values"),
    "fingerprint": (_set("fingerprint", 3), "fingerprint must be a text, got 3"),
    "unknown entry": (_set("colour", "red"), "unknown entry 'colour'"),
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_a_bad_entry_is_named_with_its_file(kind: str, result: PruneResult, tmp_path: Path) -> None:
    change, words = BAD_ENTRIES[kind]
    values = json.loads(result.plan.to_json())
    change(values)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        PruningPlan.load(file)
    assert str(file) in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"plan\.json"):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_truncated_plan_is_refused(result: PruneResult, tmp_path: Path) -> None:
    text = result.plan.to_json()
    (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="not a plan"):
        PruningPlan.load(tmp_path / "plan.json")


def test_missing_file_and_folder_without_plan_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.json cannot be read \(No such file"):
        PruningPlan.load(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no pruning_plan.json"):
        PruningPlan.load(tmp_path)
