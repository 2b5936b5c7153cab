"""The doctor: a sound model passes, and every kind of fault is found and named."""

import copy
import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.command_line import read
from helpers.detectors import make_detr
from helpers.marks import one_of_each
from helpers.pruned_models import Pruned
from helpers.tiny_models import make_base
from safetensors.torch import load_file, save_file
from transformers import DetrImageProcessor

from isoprune_hf import prune
from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.errors import WriteError
from isoprune_hf.models import load_base
from isoprune_hf.pruning import doctor
from isoprune_hf.pruning.doctor import Finding, check_model, check_replay
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.recipes import PruneRecipe

RECIPE = PruneRecipe(criterion="l1", ratio=0.4, head_ratio=0.3, head_dim_ratio=0.3, round_to=1)
CHECKS = ["cost", "structure", "no-op", "save-load", "reach"]


@pytest.fixture
def vit(pruned: Callable[[str], Pruned]) -> Pruned:
    """The pruned ViT, opened anew from its folder."""
    made = pruned("vit")
    return replace(made, model=load_base(str(made.folder)).model)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, PruneResult]:
    base = make_base("vit", tmp_path_factory.mktemp("base"))
    return base, prune_model(base, RECIPE)


def examine(made: Pruned, plan: PruningPlan | None = None) -> dict[str, Finding]:
    plan = PruningPlan.load(made.folder) if plan is None else plan
    return {finding.check: finding for finding in check_model(made.model, made.processor, plan)}


@pytest.mark.parametrize("family", one_of_each(["vit", "resnet", "swin", "hf-vit"], "vit", "resnet"))
def test_a_sound_model_passes_every_check(family: str, pruned: Callable[[str], Pruned]) -> None:
    made = pruned(family)
    made = replace(made, model=load_base(str(made.folder)).model)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    findings = examine(made)
    assert list(findings) == CHECKS
    assert {finding.verdict for finding in findings.values()} == {"ok"}, findings
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())


def test_network_that_reads_its_mask_passes(tmp_path: Path) -> None:
    settings = {"criterion": "l1", "reconstruct": "none", "rotate": False, "round_to": 1}
    made = prune(make_detr(), torch.zeros(1, 3, 64, 64), target_macs="80%", **settings)
    made.save(tmp_path / "folder", DetrImageProcessor(size={"height": 64, "width": 64}))
    opened = load_base(str(tmp_path / "folder"), tasks=TASK_FORMS)
    found = check_model(opened.model, opened.processor, PruningPlan.load(tmp_path / "folder"))
    assert {finding.check: finding.verdict for finding in found} == dict.fromkeys(CHECKS, "ok")


def test_wrong_recorded_cost_is_found(vit: Pruned) -> None:
    cost = copy.deepcopy(vit.model.config.cost)
    cost["pruned"]["macs"] += 1
    vit.model.config.cost = cost
    finding = examine(vit)["cost"]
    assert finding.verdict == "FAIL" and str(cost["pruned"]["macs"]) in finding.text
    vit.model.config.cost = None
    assert examine(vit)["cost"].verdict == "skip"


def test_cost_is_reported_as_share_of_base(vit: Pruned) -> None:
    params = sum(parameter.numel() for parameter in vit.model.parameters())
    share = params / vit.model.config.cost["base"]["params"]
    assert f"{100 * share:.1f}% of its params" in examine(vit)["cost"].text


def test_plan_with_other_widths_or_heads_is_found(vit: Pruned) -> None:
    plan = PruningPlan.load(vit.folder)
    name = "blocks.1.mlp.fc1"
    finding = examine(vit, replace(plan, kept={**plan.kept, name: plan.kept[name][1:]}))["structure"]
    assert finding.verdict == "FAIL" and f"config.structure.shapes['{name}.bias'] is" in finding.text
    # One head of 4 x n dims less: shapes would do, but the numbers of the attention come along.
    name = "blocks.0.attn"
    vit.model.config.structure["attributes"][name]["num_heads"] = 1
    findings = examine(vit)
    assert findings["structure"].verdict == "FAIL"
    assert f"config.structure.attributes['{name}']" in findings["structure"].text
    # A folder that is written anew has the numbers of the network in memory, not those of its config.
    assert findings["save-load"].verdict == "ok"


def change_the_activation(folder: Path) -> None:
    """Name another activation in the config, which has the same tensors."""
    config = read(folder, "config.json")
    config["base"]["args"]["act_layer"] = "relu"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def move_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.head.bias"][0] = torch.nextafter(tensors["model.head.bias"][0], torch.tensor(10.0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FOLDER_FAULTS = {
    change_the_activation: "an output came back different",
    move_a_weight: "head.bias came back different",
}


@pytest.mark.parametrize("damage", FOLDER_FAULTS)
def test_folder_with_other_outputs_is_found(
    damage: Callable[[Path], None], vit: Pruned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving that loses a part of the model, of which the folder says nothing."""
    save = doctor.save_model_folder

    def save_wrongly(folder: Path, *arguments: object) -> None:
        save(folder, *arguments)
        damage(folder)

    monkeypatch.setattr(doctor, "save_model_folder", save_wrongly)
    assert examine(vit)["save-load"] == Finding("save-load", "FAIL", FOLDER_FAULTS[damage])


@pytest.mark.parametrize("place", ["tempfile.mkdtemp", "isoprune_hf.checkpoint.folder.sync_file"])
def test_full_disk_says_nothing_about_the_model(place: str, vit: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, fail)
    with pytest.raises(WriteError, match="No space left on device"):
        examine(vit)


def test_plan_that_does_not_fit_base_is_found(vit: Pruned) -> None:
    plan = PruningPlan.load(vit.folder)
    finding = examine(vit, replace(plan, kept={**plan.kept, "blocks.5.mlp.fc1": (0,)}))["structure"]
    assert finding.verdict == "FAIL" and "no group 'blocks.5.mlp.fc1'" in finding.text


def test_without_a_plan_the_structure_is_not_compared(vit: Pruned) -> None:
    findings = check_model(vit.model, vit.processor, None)
    assert {finding.check: finding.verdict for finding in findings} == {
        **dict.fromkeys(CHECKS, "ok"),
        "structure": "skip",
    }


def test_model_cut_twice_is_compared_with_last_plan(vit: Pruned) -> None:
    again = prune_model(vit.model, replace(RECIPE, head_ratio=0.0))
    twice = replace(vit, model=again.model)
    finding = examine(twice, again.plan)["structure"]
    assert finding.verdict == "ok" and "a model cut before" in finding.text
    first = PruningPlan.load(vit.folder)
    finding = examine(twice, replace(first, fingerprint="another"))["structure"]
    assert finding.verdict == "FAIL" and "the plan keeps" in finding.text


def test_surgery_that_changes_kept_values_is_found(vit: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rightly = doctor.apply_plan

    def cut_wrongly(*arguments):
        model = cut_rightly(*arguments)
        with torch.no_grad():
            model.model.head.bias += 1
        return model

    monkeypatch.setattr(doctor, "apply_plan", cut_wrongly)
    finding = examine(vit)["no-op"]
    assert finding.verdict == "FAIL" and "changes the outputs" in finding.text


def test_model_that_reloads_differently_is_found(vit: Pruned) -> None:
    vit.model.model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    finding = examine(vit)["save-load"]
    assert finding.verdict == "FAIL" and "'blocks.0' (Block) has forward hooks" in finding.text


def test_impossible_check_fails_with_reason(vit: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise doctor.IsoPruneError("the channels\ncannot be followed")

    monkeypatch.setattr(doctor, "trace_groups", refuse)
    findings = examine(vit)
    assert findings["no-op"] == Finding("no-op", "FAIL", "the channels cannot be followed")
    assert findings["reach"].verdict == "FAIL" and findings["cost"].verdict == "ok"


def test_the_reach_counts_the_layers_of_the_groups(vit: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "trace_groups", lambda model: [g for g in trace_groups(model) if "fc1" in g.name])
    lines = examine(vit)["reach"].text.splitlines()
    # By hand: 16 patches and a class token; 32 wide, 128 hidden, two blocks; 7 classes.
    tokens, width, hidden, classes = 17, 32, 128, 7
    mlp = 2 * 2 * tokens * width * hidden
    attention = 2 * (tokens * (3 * width * width + width * width) + 2 * tokens * tokens * width)
    macs = 16 * 48 * width + mlp + attention + width * classes
    reached = 2 * (2 * width * hidden + hidden)  # both weights and the bias of fc1
    params = sum(parameter.numel() for parameter in make_base("vit", vit.folder).parameters())
    assert f"{mlp / macs:.1%} of the MACs and {reached / params:.1%} of the params of the base" in lines[0]
    # fc1: weight and bias, fc2: its weight, in both blocks.
    assert f"; {36 - 6} of 36 parameters in none" in lines[0]
    fixed = dict(line.removeprefix("fixed: ").split(": ", 1) for line in lines[1:])
    assert fixed["another dim of a layer that a group reaches"] == "blocks.*.mlp.fc*.weight (4)"
    assert fixed["no group was found for it"].startswith("cls_token, ")
    assert fixed["no group was found for it"].endswith(" more")


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_what_stays_fixed_is_named_with_its_reason(family: str, pruned: Callable[[str], Pruned]) -> None:
    fixed = {
        "vit": {"positions of tokens: pos_embed", "colours of the image: patch_embed.proj.weight"}
        | {"outputs of the network: head.weight, head.bias"},
        "swin": {"colours of the image: patch_embed.proj.weight"}
        | {"relative positions in a window: layers.*.blocks.*.attn.relative_position_bias_table (4)"}
        | {"outputs of the network: head.fc.weight, head.fc.bias"},
        "resnet": {"colours of the image: conv*.weight", "outputs of the network: fc.weight, fc.bias"},
    }[family]
    lines = examine(pruned(family))["reach"].text.splitlines()
    assert {line.removeprefix("fixed: ") for line in lines[1:]} == fixed
    assert "; 1 of " in lines[0]  # the bias of the classifier


def test_every_tensor_of_cut_equals_base(cut) -> None:
    base, result = cut
    assert check_replay(result.model, base, result.plan) == Finding(
        "tensors", "ok", "36 tensors are those of the base, bit for bit"
    )


def test_single_bit_that_differs_is_found(cut) -> None:
    base, result = cut
    model = copy.deepcopy(result.model)
    with torch.no_grad():
        model.model.head.bias[0] = torch.nextafter(model.model.head.bias[0], torch.tensor(10.0))
    finding = check_replay(model, base, result.plan)
    assert finding.verdict == "FAIL" and finding.text.startswith("head.bias is not")
    base = copy.deepcopy(base)
    base.model.head.bias.data[0] = 0.0
    again = prune_model(base, RECIPE)
    with torch.no_grad():
        again.model.model.head.bias[0] = -0.0  # equal as a number, another tensor all the same
    assert check_replay(again.model, base, again.plan).text.startswith("head.bias is not")
    assert check_replay(model.bfloat16(), base, again.plan).text.startswith("cls_token is not")


def test_plan_that_cannot_be_replayed_is_found(cut) -> None:
    base, result = cut
    finding = check_replay(result.model, base, replace(result.plan, kept={**result.plan.kept, "blocks.9.attn": (0,)}))
    assert finding.verdict == "FAIL" and "no group 'blocks.9.attn'" in finding.text


def test_plan_of_other_weights_is_not_compared(cut, tmp_path: Path) -> None:
    base, result = cut
    assert check_replay(result.model, base, replace(result.plan, fingerprint="another")).verdict == "skip"
