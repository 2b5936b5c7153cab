"""One small model for each root cause of unprunable architectures, and a sample of those of `benchmarks/coverage.py`.

The complete sample is `python benchmarks/coverage.py --population named --sample 0.1 --seed 0`. Here run, by default
and in the same order, the first `SAMPLED` models that took at most `CHEAP` seconds of CPU time when measured:
a third of them, and most of the small models, run in `make test-faults`.
"""

import copy
import json
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import coverage_case
import pytest
import torch
from coverage_case import NUM_IMAGES
from coverage_images import read_images
from coverage_models import Case, cases_of, in_strata
from coverage_record import FailedError, Record, describe
from coverage_repair import check_repair, errors_of
from coverage_run import RESULTS, Run, joined, known_rows, read_records, run_cases
from coverage_table import WAYS, read_rows
from helpers.marks import one_of_each
from helpers.oracles import exact_logits, make_images, mask_error, permutation_error, prunable_share, randomize
from helpers.tiny_models import make_base
from timm.layers import set_fused_attn
from torch import nn
from transformers import CONFIG_MAPPING

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneConfig, IsoPruneForImageClassification
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.models.feature_loss import FEATURES
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe

LABELS, SIDE = 7, 64
SAMPLED, CHEAP = 10, 4.0
TINY = Case("tiny", "timm", "vision_transformer", "test_vit", {"img_size": 64, "depth": 1})
_VIT = {
    "image_size": SIDE,
    "patch_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
_TEXT = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
# Root cause and family -> model: a name of timm with arguments, or a type of transformers with its config.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "T-rexnet": ("timm/rexnet_100", {"width_mult": 0.5, "depth_mult": 0.5}),
    "T-focalnet": ("timm/focalnet_tiny_srf", {"focal_levels": [1, 1, 1, 1]}),
    "A-pvt_v2": (
        "timm/pvt_v2_b0",
        {"depths": [1, 1, 1, 1], "embed_dims": [32, 64, 96, 128], "num_heads": [1, 2, 3, 4]},
    ),
    "Q-levit": (
        "timm/levit_128s",
        {"img_size": SIDE, "embed_dim": [64, 96, 128], "num_heads": [2, 3, 4], "depth": [1, 1, 1]},
    ),
    "Q-xcit": ("timm/xcit_nano_12_p16_224", {"img_size": SIDE, "depth": 2, "embed_dim": 64, "num_heads": 2}),
    "C-coat": (
        "timm/coat_tiny",
        {
            "img_size": SIDE,
            "embed_dims": [128, 128, 128, 128],
            "serial_depths": [1, 1, 1, 1],
            "parallel_depth": 1,
        },
    ),
    "C-dinov2": ("dinov2", _VIT),
    "S-dpn": ("timm/dpn48b", {"k_sec": [1, 1, 1, 1]}),
    "S-res2net": ("timm/res2net50_14w_8s", {"layers": [1, 1, 1, 1]}),
    "H-swinv2": (
        "timm/swinv2_tiny_window8_256",
        {"img_size": SIDE, "window_size": 4, "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4]},
    ),
    "H-hf-swinv2": (
        "swinv2",
        {"image_size": SIDE, "window_size": 4, "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4]},
    ),
    "R-twins": (
        "timm/twins_svt_small",
        {
            "img_size": SIDE,
            "depths": [2, 1, 1, 1],
            "embed_dims": [32, 64, 96, 128],
            "num_heads": [1, 2, 3, 4],
            "wss": [4, 4, 4, 2],
        },
    ),
    "R-hiera": (
        "hiera",
        {
            "image_size": [SIDE, SIDE],
            "embed_dim": 32,
            "depths": [1, 1, 1],
            "num_heads": [1, 2, 4],
            "num_query_pool": 2,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, True, False],
        },
    ),
    "O-nfnet": ("timm/nf_resnet26", {"depths": [1, 1, 1, 1], "channels": [64, 96, 128, 160]}),
    "O-sequencer": (
        "timm/sequencer2d_s",
        {"layers": [1, 1, 1, 1], "embed_dims": [32, 48, 64, 64], "hidden_sizes": [16, 16, 16, 16]},
    ),
    "D-siglip": ("siglip", {"vision_config": _VIT, "text_config": _TEXT}),
    "D-clip": ("clip", {"vision_config": _VIT, "text_config": _TEXT}),
    "G-pit": (
        "timm/pit_ti_224",
        {"img_size": SIDE, "depth": [1, 1, 1], "base_dims": [16, 16, 16], "heads": [2, 4, 8]},
    ),
    "G-fastvit": ("timm/fastvit_t8", {"layers": [1, 1, 1, 1], "embed_dims": [32, 64, 128, 256]}),
}


@pytest.fixture(autouse=True)
def eager_attention() -> Any:
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def open_case(case: str, folder: Path) -> BaseModel:
    name, options = CASES[case]
    if name.startswith("timm/"):
        base = load_base(name, pretrained=False, model_args=options, num_labels=LABELS)
        base.model.config.image_size = [3, SIDE, SIDE]
    else:
        CONFIG_MAPPING[name](**options, num_labels=LABELS).save_pretrained(folder)
        base = load_base(str(folder), pretrained=False)
    return BaseModel(be_eager(base.model), base.processor)


def be_eager(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    if model.config.base["library"] == "transformers":
        model.model.set_attn_implementation("eager")
    return model


def run(model: IsoPruneForImageClassification, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


@pytest.mark.parametrize("case", one_of_each(CASES, "Q-levit", mark="faults"))
def test_reloaded_base_is_bit_equal(case: str, tmp_path: Path) -> None:
    base = open_case(case, tmp_path / "config")
    randomize(base.model)
    images = make_images(base.model)
    save_model_folder(tmp_path / "dense", base.model, base.processor)
    again = be_eager(IsoPruneForImageClassification.from_pretrained(tmp_path / "dense"))
    assert torch.equal(run(again, images), run(base.model, images))


@pytest.mark.parametrize("case", one_of_each(CASES, "Q-levit", mark="faults"))
def test_architecture_is_pruned_saved_and_trained(case: str, tmp_path: Path) -> None:
    model, processor = open_case(case, tmp_path / "config")
    randomize(model)
    images = make_images(model)
    groups = trace_groups(model)
    assert prunable_share(model, groups) >= 0.9
    assert permutation_error(model, groups, images) <= 1e-9

    recipe = PruneRecipe(criterion="l1", ratio=0.5, round_to=8)
    plan = make_plan(groups, score_groups(model, groups, criterion="l1"), recipe)
    pruned = apply_plan(model, plan, groups)
    assert count_cost(pruned).params <= 0.65 * count_cost(model).params
    assert mask_error(model, pruned, groups, plan, images) <= 1e-6
    dense, cut = exact_logits(model, images), exact_logits(pruned, images)
    assert (cut - dense).abs().max() > 1e-3 * dense.abs().max()

    save_model_folder(tmp_path / "pruned", pruned, processor, plan=plan.to_json())
    again = be_eager(IsoPruneForImageClassification.from_pretrained(tmp_path / "pruned"))
    assert torch.equal(run(again, images), run(pruned, images))

    trained = copy.deepcopy(pruned).train()
    trained(images, labels=torch.tensor([0, 1])).loss.backward()
    gradients = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def sampled() -> list[Case]:
    rows = known_rows("named", RESULTS / "coverage_named.jsonl")
    seconds = {name: row.get("default", {}).get("cpu_s", CHEAP) for name, row in rows.items()}
    cheap = [case for case in in_strata(cases_of("named"), 0) if seconds.get(case.name, CHEAP) < CHEAP]
    return cheap[:SAMPLED]


def run_case(case: Case, ways: Sequence[str], folder: Path) -> dict[str, Any]:
    run = Run(read_images(None, NUM_IMAGES), seconds=100, gigabytes=12)
    run_cases([(case, ways)], run, workers=1, results=folder / "rows")
    row = read_rows(folder / "rows")[case.name]
    for part in ("load", *ways):
        assert row[part]["step"] == "done", row[part]
    assert "unrepaired" in row["default"] or row["default"]["error_repaired"] < row["default"]["error_unrepaired"]
    assert all(row[way]["macs"] <= 0.5 or "cannot be reached" in row[way]["over"] for way in ways)
    return row


def test_tiny_model_passes_in_both_ways(tmp_path: Path) -> None:
    row = run_case(TINY, WAYS, tmp_path)
    assert row["default"]["error_images"] in (16, 128)
    assert row["plain"]["permutation"] <= 1e-9
    assert "not_comparable" in row["plain"] or row["plain"]["mask"] <= 1e-6


@pytest.mark.parametrize(("error", "rounding", "passes"), [(5e-9, 2e-8, True), (5e-9, 1e-10, False), (1e-3, 1, False)])
def test_only_rounding_excuses_a_permuted_output(error, rounding, passes, tmp_path: Path, monkeypatch) -> None:
    base = make_base("vit", tmp_path)
    result = prune_model(base, PruneRecipe(criterion="l1", ratio=0.5))
    monkeypatch.setattr(coverage_case, "permutation_error", lambda *_: error)
    monkeypatch.setattr(coverage_case, "rounding_error", lambda *_: rounding)
    record = Record(tmp_path / "record.jsonl")
    with nullcontext() if passes else pytest.raises(FailedError, match="when channels are permuted"):
        coverage_case.check_oracles(base, result, make_images(base), record)


def test_backbone_of_a_task_passes_in_both_ways(tmp_path: Path) -> None:
    case = next(case for case in cases_of("tasks") if case.name == "transformers/PixioBackbone")
    row = run_case(case, WAYS, tmp_path)
    assert row["plain"]["permutation"] <= 1e-9 and row["plain"]["mask"] <= 1e-6


SAMPLE = [
    pytest.param(case, marks=pytest.mark.faults if number % 3 == 2 else pytest.mark.families)
    for number, case in enumerate(sampled())
]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_sampled_model_passes_by_default(case: Case, tmp_path: Path) -> None:
    run_case(case, ["default"], tmp_path)


def test_model_that_does_not_open_is_refused(tmp_path: Path) -> None:
    case = Case("none", "timm", "resnet", "no_such_model")
    run_cases([(case, WAYS)], Run(read_images(None, 2), seconds=100, gigabytes=12), 1, tmp_path / "rows")
    row = read_rows(tmp_path / "rows")["none"]
    assert row["load"]["kind"] == "refused" and row["load"]["step"] == "load" and not row.keys() & set(WAYS)


def test_row_keeps_ways_of_the_one_before() -> None:
    before = {"name": "a", "load": {"params": 1}, "plain": {"step": "done"}, "versions": "old"}
    row = {"name": "a", "load": {"params": 2}, "default": {"step": "closer"}, "versions": "new"}
    assert joined(before, row) == row | {"plain": {"step": "done", "versions": "old"}}
    assert joined(before | {"default": {"step": "done"}}, row)["default"] == {"step": "closer"}
    assert joined(None, row) == row


def test_killed_process_is_over_a_limit(tmp_path: Path) -> None:
    Record(tmp_path / "load").add(step="load")
    row = read_records(TINY, tmp_path, -signal.SIGXCPU)
    assert row["load"]["kind"] == "limit" and row["load"]["step"] == "load"


def test_unrepaired_weights_need_a_reason(tmp_path: Path) -> None:
    model = load_base("timm/test_vit", pretrained=False, num_labels=3).model
    images = make_images(model, 2)
    recipe = PruneRecipe(criterion="l1", reconstruct="none", target_macs="50%")
    result = prune_model(model, recipe)
    reason = "prune.reconstruct none is used instead of least_squares: it is nearest"
    noted = replace(result, plan=replace(result.plan, notes=(*result.plan.notes, reason)))
    record = Record(tmp_path / "record")
    with pytest.raises(FailedError):
        check_repair(model, result, recipe, None, (images, images), record)
    check_repair(model, noted, recipe, None, (images, images), record)
    assert json.loads((tmp_path / "record").read_text()) == {"unrepaired": reason}


class Scaled:
    """A classifier whose logits are multiples of its images."""

    def __init__(self, scale: float):
        self.scale, self.config = scale, IsoPruneConfig()

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.scale * images}


def test_errors_are_shares_of_the_variance() -> None:
    images = torch.tensor([[0.0, 0.0], [2.0, 4.0]])  # variances 1 and 4 around the mean image
    found = errors_of(Scaled(0.5), Scaled(1.0), images)
    torch.testing.assert_close(found, torch.tensor([0.0, (1 + 4) / 2 / 2.5], dtype=torch.float64))


def test_errors_of_features_are_relative_squares() -> None:
    module = nn.Linear(2, 2, bias=False)
    config = IsoPruneConfig(base={"library": "transformers", "task": "image-feature-extraction"})
    base = HeldModel(config, module, FEATURES)
    cut = copy.deepcopy(base)
    with torch.no_grad():
        module.weight.copy_(torch.eye(2))
        cut.model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    found = errors_of(cut, base, torch.tensor([[3.0, 0.0], [3.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 2**2 / 5**2], dtype=torch.float64))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FailedError("logits differ"), "wrong"),
        (RecipeError("no such name"), "refused"),
        (KeyError("no"), "traceback"),
    ],
)
def test_failures_have_kinds(error: Exception, kind: str, tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    record.add(step="train")
    with record.measured():
        raise error
    lines = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert lines[0] == {"step": "train"}
    assert (lines[1]["kind"], lines[1]["type"]) == (kind, type(error).__name__)
    assert lines[2].keys() == {"cpu_s", "peak_mb"}


def test_failure_has_the_stage_of_the_pipeline() -> None:
    base = load_base("timm/test_vit", pretrained=False, num_labels=3)
    with pytest.raises(RecipeError) as caught:
        prune_model(base.model, PruneRecipe(criterion="taylor", rotate=False), [])
    assert describe(caught.value)["step"] == "score"
