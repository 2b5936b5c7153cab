"""The speed report: turns, quartiles, what MACs promise, and a sentence whose figures are those of the layers."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import isoprune, read, refuse
from helpers.pruned_models import Pruned
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.errors import MissingExtraError, RecipeError
from isoprune_hf.measuring.memory import peak_memory
from isoprune_hf.measuring.speed import time_calls
from isoprune_hf.reporting.benchmark import (
    BenchmarkSettings,
    _quartiles,
    _row,
    _spread,
    benchmark_table,
    benchmark_text,
)
from isoprune_hf.reporting.speed_reasons import advise_multiple, explain_speed, look_at_layers


def test_calls_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    spent = iter([9.0, 9.0, 0.001, 0.002, 0.003, 0.004])

    def call(name: str) -> float:
        order.append(name)
        return next(spent)

    times = time_calls({name: lambda name=name: call(name) for name in "ab"}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert times == {"a": pytest.approx([1.0, 3.0]), "b": pytest.approx([2.0, 4.0])}


def test_a_row_that_took_its_seconds_ends_after_five_turns() -> None:
    assert len(time_calls({"a": lambda: 1.0}, repeats=20, warmup=1, seconds=2.5)["a"]) == 5
    assert len(time_calls({"a": lambda: 1.0}, repeats=20, warmup=1, seconds=7.5)["a"]) == 8
    assert len(time_calls({"a": lambda: 1.0}, repeats=3, warmup=0, seconds=0.5)["a"]) == 3


def test_a_row_holds_medians_quartiles_and_the_share_of_the_promise() -> None:
    row = _row("eager", "fp32", 1, {"base": [8, 9, 10, 11, 12], "pruned": [1, 3, 4, 5, 70]}, 2.0, None)
    assert row["base"] == {"median": 10, "low": 9, "high": 11}
    assert row["pruned"] == {"median": 4, "low": 3, "high": 5}
    assert (row["faster"], row["of_promised"], row["turns"]) == (2.5, 1.25, 5)


def test_times_have_three_digits() -> None:
    shown = [_spread(_quartiles([value] * 5)) for value in (0.01234, 1.2345, 12.345, 1234.5)]
    assert shown == ["0.0123 (0.0123 to 0.0123)", "1.23 (1.23 to 1.23)", "12.3 (12.3 to 12.3)", "1234 (1234 to 1234)"]


def record_of(**changes: Any) -> dict[str, Any]:
    times = {"base": [10.0] * 5, "pruned": [8.0] * 5}
    rows = [_row("eager", "fp32", 1, times, 2.5, {"base": 4_000_000, "pruned": 1_500_000})]
    rows.append(_row("onnx", "fp32", 16, {**times, "pruned": [4.0] * 5}, 2.5, None))
    layers = {"narrow": 0.0, "depthwise": 0.0, "unaligned": {"8": 0.0, "16": 0.0, "32": 0.0}}
    machine = {"device": "a CPU", "threads": 2, "versions": {"torch": "9.9"}}
    return {
        "machine": machine,
        "promised": 2.5,
        "rows": rows,
        "layers": layers,
        "left_out": [],
        "reason": "So.",
    } | changes


def test_the_table_shows_each_row_and_no_memory_where_none_was_measured() -> None:
    assert benchmark_table(record_of()) == [
        ["runtime", "dtype", "batch", "base ms", "pruned ms", "faster", "of MACs", "base MB", "pruned MB"],
        ["eager", "fp32", "1", "10.0 (10.0 to 10.0)", "8.00 (8.00 to 8.00)", "1.25x", "0.50", "4.0", "1.5"],
        ["ONNX Runtime", "fp32", "16", "10.0 (10.0 to 10.0)", "4.00 (4.00 to 4.00)", "2.50x", "1.00", "-", "-"],
    ]
    text = benchmark_text(record_of(left_out=["ONNX Runtime in bf16: its CPU kernels are of fp32"]))
    assert text.startswith("a CPU, 2 threads; torch 9.9\nMACs promise 2.50x;")
    assert "\nnot measured: ONNX Runtime in bf16: its CPU kernels are of fp32\n" in text


def test_the_sentence_names_what_the_layers_are_like_and_the_round_to_that_helps() -> None:
    aligned = explain_speed(record_of())
    assert aligned.startswith("The clock gives 0.50 to 1.00 of the 2.50x that MACs promise: norms, activations")
    assert aligned.endswith("no round_to would align it better.")
    layers = {"narrow": 0.31, "depthwise": 0.12, "unaligned": {"8": 0.04, "16": 0.62, "32": 0.9}}
    sentence = explain_speed(record_of(layers=layers))
    assert "62% of the MACs are in layers whose widths are no multiples of 16, 31% are in layers narrower" in sentence
    assert "12% are in depthwise convolutions" in sentence and "--prune.round_to 16 would help." in sentence
    assert advise_multiple({"unaligned": {"8": 0.06, "16": 0.06, "32": 1.0}}) == 8


class Net(nn.Module):
    """Three layers whose MACs are counted by hand, on images of 3 x 4 x 4 for 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"image_size": [3, 4, 4], "num_labels": 10})
        self.conv, self.deep = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.fc, self.head = nn.Linear(64, 68), nn.Linear(68, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.deep(self.conv(pixels)).mean((2, 3))))


def test_shares_of_layers_are_those_found_by_hand() -> None:
    # 64 x 3 x 16 + 64 x 9 x 16 + 64 x 68 + 68 x 10 MACs; 68 is no multiple of 8; nothing is below 64.
    total = 3072 + 9216 + 4352 + 680
    layers = look_at_layers(Net())
    assert layers["depthwise"] == pytest.approx(9216 / total)
    assert layers["narrow"] == 0
    assert layers["unaligned"] == pytest.approx(dict.fromkeys(("8", "16", "32"), (4352 + 680) / total))


class Steps(nn.Module):
    """Makes two tensors of 1 MB, frees one, makes a third."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first = torch.zeros(250_000) + 0
        second = first + 1
        del first
        return second.view(-1) * 2


def test_the_peak_of_memory_is_that_of_the_tensors_which_live_at_once() -> None:
    # At most two tensors of 10^6 bytes at a time, beside 4000 bytes of weights and one image of 3 x 2 x 2 in fp32.
    assert peak_memory(Steps().eval(), (3, 2, 2)) == 2_000_000 + 4_000 + 48


@pytest.mark.slow
def test_a_folder_keeps_its_figures_and_its_card_shows_them(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    folder = shutil.copytree(pruned("vit").folder, tmp_path / "vit")
    (folder / "speed.json").write_text(
        '{"milliseconds": {"base": 5.0}, "device": "cpu", "threads": 1, "batch_size": 1}'
    )
    flags = ["--base", _dense(pruned, tmp_path), "--batch_sizes", "[1,2]", "--repeats", "5", "--threads", "1"]
    done = isoprune("benchmark", folder, *flags, "--runtimes", "[eager,onnx]", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    speed = read(folder, "speed.json")
    record = speed["benchmark"]
    assert speed["milliseconds"] == {"base": 5.0}
    cases = [(row["runtime"], row["dtype"], row["batch_size"]) for row in record["rows"]]
    assert cases == [("eager", d, n) for d in ("fp32", "bf16") for n in (1, 2)] + [("onnx", "fp32", n) for n in (1, 2)]
    cost = read(folder, "config.json")["cost"]
    assert record["promised"] == pytest.approx(cost["base"]["macs"] / cost["pruned"]["macs"])
    for row in record["rows"]:
        assert row["faster"] == pytest.approx(row["base"]["median"] / row["pruned"]["median"])
        assert row["base"]["low"] <= row["base"]["median"] <= row["base"]["high"] and row["turns"] == 5
        assert ("memory" in row) == (row["runtime"] == "eager")
    eager = {(row["dtype"], row["batch_size"]): row["memory"] for row in record["rows"][:4]}
    assert eager["bf16", 1]["base"] < eager["fp32", 1]["base"] < eager["fp32", 2]["base"]
    assert eager["fp32", 1]["pruned"] < eager["fp32", 1]["base"]
    assert record["machine"]["threads"] == 1
    assert record["left_out"] == ["ONNX Runtime in bf16: its CPU kernels are of fp32"]
    card = (folder / "README.md").read_text()
    for line in benchmark_table(record)[1:]:
        assert f"| {' | '.join(line)} |" in card
    assert record["reason"] in card and record["machine"]["device"] in card
    assert record["reason"] in done.out


def _dense(pruned: Callable[[str], Pruned], tmp_path: Path) -> Path:
    """The base of the tiny ViT, as a folder."""
    base = make_base("vit", tmp_path / "bases", labels=7)
    sample = pruned("vit")
    base.config.id2label, base.config.label2id = sample.model.config.id2label, sample.model.config.label2id
    base.save_pretrained(tmp_path / "base")
    sample.processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_sizes": []}, "batch_sizes must name at least one"),
        ({"batch_sizes": [1, 0]}, r"batch_sizes\[1\] must be at least 1, got 0"),
        ({"repeats": 4}, "repeats must be at least 5, got 4"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"runtimes": []}, "runtimes must name at least one"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        BenchmarkSettings(**settings)


def test_a_missing_runtime_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        MissingExtraError, match=r"needs onnxruntime, which is not installed: pip install isoprune-hf\[export\]"
    ):
        BenchmarkSettings()
    BenchmarkSettings(runtimes=["eager"])


def test_what_cannot_be_compared_is_one_line_and_leaves_the_folder(
    pruned: Callable[[str], Pruned], tmp_path: Path
) -> None:
    folder = shutil.copytree(pruned("vit").folder, tmp_path / "vit")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps({"model_type": "isoprune", "stage": "base"}))
    before = (folder / "README.md").exists(), sorted(path.name for path in folder.iterdir())
    assert "there is nothing to compare" in refuse("benchmark", tmp_path / "dense")
    assert "there is nothing to compare" in refuse("benchmark", tmp_path / "none")
    assert "threads must be at least 1, got 0" in refuse(
        "benchmark", folder, "--threads", "0", "--base", "timm/test_vit"
    )
    if not torch.cuda.is_available():
        assert "--device cuda: this machine has no CUDA device" in refuse("benchmark", folder, "--device", "cuda")
    assert ((folder / "README.md").exists(), sorted(path.name for path in folder.iterdir())) == before
