"""The accuracy benchmark: images, equal MACs, and reproducible cells."""

import pruned_accuracy_data as data
import pruned_accuracy_methods as methods
import pytest
import torch
from pruned_accuracy import describe_cell, measure_cell, read_results, write_table
from pruned_accuracy_nets import Net, build

from isoprune_hf.pruning.cost.macs import count_cost

pytestmark = pytest.mark.benchmarks


@pytest.fixture
def tiny(monkeypatch):
    vit = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 24, "depth": 1, "num_heads": 2}
    base = {"library": "timm", "architecture": "vit_tiny_patch16_224", "args": vit}
    net = Net(base, 1e-3, calibration=64, epoch=50)
    for module in ("pruned_accuracy", "pruned_accuracy_nets"):
        monkeypatch.setattr(f"{module}.NETS", {"tiny": net})
    return build("tiny").eval()


@pytest.mark.parametrize(("name", "count"), [("glyphs", 61), pytest.param("letters", 200, marks=pytest.mark.faults)])
def test_classes_look_different_in_every_face(name: str, count: int) -> None:
    masks, labels = data.glyph_masks(name)
    assert len(set(data.ALPHABETS[name])) == len(data.ALPHABETS[name]) >= count
    assert labels.bincount().tolist() == [len(data.FACES)] * len(data.ALPHABETS[name])
    for face in masks.view(len(data.FACES), len(data.ALPHABETS[name]), -1):
        distances = torch.cdist(face, face) + torch.eye(len(face)) * 1e9
        assert distances.min() > 1  # characters missing in a font are all drawn as the same box


def test_image_depends_on_its_seed_only() -> None:
    first, again, other = (data.draw("glyphs", 8, seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_splits_and_streams_have_different_seeds() -> None:
    seeds = [data.SELECTION, data.REPORT]
    seeds += [
        data.stream_seed(purpose, seed) for purpose in ("train", "calibrate", "finetune") for seed in range(2000)
    ]
    assert len(set(seeds)) == len(seeds)


def test_splits_of_digits_do_not_overlap() -> None:
    sizes = [len(data.digit_masks(split)[1]) for split in ("train", "selection", "report")]
    assert sizes == [1097, 300, 400]
    with pytest.raises(KeyError):
        data.digit_masks("test")


def test_warp_without_changes_averages_four_subpixels(monkeypatch) -> None:
    for name in ("NOISE", "MAX_TURN", "MAX_CHANGE"):
        monkeypatch.setattr(data, name, 0.0)
    monkeypatch.setattr(data, "MIN_CONTRAST", 1.0)
    masks = torch.rand(2, 32, 32)
    expected = (masks[:, ::2, ::2] + masks[:, 1::2, ::2] + masks[:, ::2, 1::2] + masks[:, 1::2, 1::2]) / 4
    found = data.warp(masks, torch.Generator().manual_seed(0))[:, 0] * 0.3 + 0.2
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["tp_iso", "paper"])
def test_cell_is_reproducible_and_keeps_dense_model(tiny, method) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    first, second = (measure_cell(tiny, "tiny", method, 0.5, 0, finetune=True) for _ in range(2))
    assert {**first, "seconds": None} == {**second, "seconds": None}
    assert abs(first["share"] - 0.5) < 0.02
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_search_bisects_first_step_below_budget() -> None:
    tried = []

    def share(ratio: float) -> float:  # rises again above 0.6, as torch-pruning's does
        tried.append(ratio)
        return 1 - ratio if ratio < 0.6 else 0.9

    methods.reach_budget(share, 0.469)
    assert tried[:11] == pytest.approx([0.05 * step for step in range(1, 12)])
    assert max(tried) == pytest.approx(0.55)
    assert abs(1 - tried[-1] - 0.469) <= 0.002


def test_recalibrated_batchnorm_has_statistics_of_calibration_images() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1)).eval()
    images = 3 + 2 * torch.randn(128, 1, 4, 4)
    methods.recalibrate_batchnorm(model, list(images.split(64)))
    assert torch.allclose(model[0].running_mean, images.mean((0, 2, 3)))
    parts = torch.stack([part.var((0, 2, 3)) for part in images.split(64)])
    assert torch.allclose(model[0].running_var, parts.mean(0))
    assert model[0].momentum == 0.1


def test_unknown_setting_is_named_in_skipped_cell(tiny, monkeypatch) -> None:
    settings = {"criterion": "l1", "no_such_setting": 1}
    monkeypatch.setitem(methods.METHODS, "odd", lambda case: methods.with_recipe(case, **settings))
    record = measure_cell(tiny, "tiny", "odd", 0.5, 0, finetune=False)
    assert record["skipped"] == "PruneRecipe does not know no_such_setting"


def test_table_shows_mean_and_standard_error(tmp_path, monkeypatch) -> None:
    lines = [
        f'{{"net": "vit", "method": "paper", "budget": 0.5, "seed": {seed}, "share": 0.5, "before": '
        f'{{"selection": 0, "report": {top1}}}, "seconds": {{"all": 2}}}}'
        for seed, top1 in enumerate((60, 64))
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "vit").mkdir()
    monkeypatch.setattr("pruned_accuracy.read_dense", lambda *_: {"macs": 11_640_000, "report": 94.0})
    table = write_table(read_results([tmp_path / "results.jsonl"]), tmp_path)
    assert "| method | vit |\n|---|---:|\n| dense | 94.0 |\n| `paper` | 62.0 ± 2.0 |\n" in table
    assert "| method | all |\n|---|---:|\n| `paper` | 2.0 |" in table
    record = {"share": 0.43, "before": {"report": 50.04}, "after": {"report": 61.5}}
    assert describe_cell([record], 0.5) == "50.0 → 61.5 at 43.0%"


def test_nets_have_the_studied_sizes() -> None:
    block = 12 * 96**2 * 17 + 2 * 17**2 * 96  # qkv, projection and MLP of 17 tokens; both products of attention
    assert count_cost(build("vit")).macs == 6 * block + 16 * 16 * 96 + 61 * 96
    assert round(count_cost(build("resnet")).macs / 1e6, 2) == 5.64  # as in the study
