"""The speed report: its table and text, and the sentence that explains it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import isoprune, read, refuse
from helpers.pruned_models import Pruned
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.measuring.cases import quartiles, record_case
from isoprune_hf.measuring.timing import Passes, Timing
from isoprune_hf.reporting.benchmark import (
    _compare_with_fastest,
    benchmark_table,
    benchmark_text,
    format_quartiles,
    without_busy_rows,
)
from isoprune_hf.reporting.speed_reasons import advise_multiple, describe_layers, explain_speed_gap


def test_times_have_three_significant_digits() -> None:
    shown = [format_quartiles(quartiles([value] * 5)) for value in (0.01234, 1.2345, 12.345, 1234.5)]
    assert shown == ["0.0123 (0.0123 to 0.0123)", "1.23 (1.23 to 1.23)", "12.3 (12.3 to 12.3)", "1234 (1234 to 1234)"]


def times_of(**medians: float) -> Timing:
    return Timing({name: Passes((time,) * 5, (time,) * 5) for name, time in medians.items()}, None)


def record_of(**changes: Any) -> dict[str, Any]:
    slow, fast = (times_of(base=10.0, pruned=pruned) for pruned in (8.0, 4.0))
    rows = [
        record_case("eager", "fp32", 1, slow, promised=2.5) | {"memory": {"base": 4_000_000, "pruned": 1_500_000}},
        record_case("onnxruntime", "fp32", 16, fast, promised=2.5),
    ]
    layers = {"narrow": 0.0, "depthwise": 0.0, "unaligned": {"8": 0.0, "16": 0.0, "32": 0.0}}
    layers |= {"convolutions": 49, "unblocked": 0}
    machine = {"device": "a CPU", "threads": 2, "versions": {"torch": "9.9"}}
    return {
        "machine": machine,
        "promised": 2.5,
        "rows": rows,
        "layers": layers,
        "modules": {"Conv2d": 0.6, "ReLU": 0.2, "Add": 0.15, "Linear": 0.05},
        "left_out": [],
        "reason": "So.",
    } | changes


def test_table_shows_a_dash_for_unmeasured_memory() -> None:
    assert benchmark_table(record_of()) == [
        ["runtime", "dtype", "batch", "base ms", "pruned ms", "faster", "of MACs", "base MB", "pruned MB"],
        ["eager", "fp32", "1", "10.0 (10.0 to 10.0)", "8.00 (8.00 to 8.00)", "1.25x", "0.50", "4.0", "1.5"],
        ["ONNX Runtime", "fp32", "16", "10.0 (10.0 to 10.0)", "4.00 (4.00 to 4.00)", "2.50x", "1.00", "-", "-"],
    ]
    text = benchmark_text(record_of(left_out=["ONNX Runtime in bf16: its CPU kernels are of fp32"]))
    assert text.startswith("a CPU, 2 threads; torch 9.9\nMACs promise 2.50x;")
    assert "\nnot measured: ONNX Runtime in bf16: its CPU kernels are of fp32\n" in text


def test_busy_rows_are_shown_and_not_published() -> None:
    record = record_of()
    record["rows"][0]["busy"] = "drift"
    text = benchmark_text(record)
    assert "1.25x (busy)" in text and "not stored" in text
    kept = without_busy_rows(record)
    assert [row["runtime"] for row in kept["rows"]] == ["onnxruntime"]
    assert kept["left_out"] == ["eager in fp32, batch 1: machine busy (drift)"]
    assert len(record["rows"]) == 2


def test_sentence_names_dominant_modules_and_helpful_round_to() -> None:
    aligned = explain_speed_gap(record_of())
    assert "0.50 to 1.00 of the 2.50x" in aligned and "finds 60% in Conv2d, 20% in ReLU, 15% in Add." in aligned
    assert "MACs are in layers" not in aligned and "channels_last" not in aligned
    layers = {"narrow": 0.31, "depthwise": 0.12, "unaligned": {"8": 0.04, "16": 0.62, "32": 0.9}}
    sentence = explain_speed_gap(record_of(layers=layers))
    assert re.search("62% of the MACs .* multiples of 16, which --prune.round_to 16", sentence)
    assert advise_multiple({"unaligned": {"8": 0.06, "16": 0.06, "32": 1.0}}) == 8


def test_runtimes_slower_than_base_are_named() -> None:
    record = record_of()
    assert "slower" not in explain_speed_gap(record)
    record["rows"] += [
        record_case("openvino", "fp32", 1, times_of(base=4.0, pruned=5.0), promised=2.5),
        record_case("onnxruntime", "fp32", 1, times_of(base=6.0, pruned=12.0), promised=2.5),
        record_case("onnxruntime", "fp32", 16, times_of(base=6.0, pruned=8.0), promised=2.5),
    ]
    sentence = explain_speed_gap(record)
    assert "It is slower than its base in OpenVINO (0.80x), ONNX Runtime (0.50x)." in sentence
    record["layers"]["unblocked"] = 35
    sentence = explain_speed_gap(record)
    assert "ONNX Runtime (0.50x): 35 of its 49 convolutions have widths that are not multiples of 8" in sentence


def test_layout_is_compared_within_a_case() -> None:
    record = record_of()
    record["rows"] += [
        record_case("channels_last", "fp32", size, times_of(base=9.0, pruned=2.0), promised=2.5) for size in (1, 16)
    ]
    # 2 ms of 8 at one image; eager was not measured at sixteen.
    assert "takes 0.25 of its eager time" in explain_speed_gap(record)


def test_speed_up_is_compared_with_fastest_quiet_base() -> None:
    record = record_of()
    record["rows"] += [
        record_case("channels_last", "bf16", 1, times_of(base=6.0, pruned=3.0), promised=2.5),
        {**record_case("compile", "fp32", 1, times_of(base=2.0, pruned=1.0), promised=2.5), "busy": "drift"},
    ]
    _compare_with_fastest(record)
    # The busy base is not the fastest one; at sixteen images there is one row alone.
    assert [row["of_fastest"] for row in record["rows"]] == [0.75, 2.5, 2.0, 6.0]
    assert record["fastest_base"] == {
        "1": {"runtime": "channels_last", "dtype": "bf16"},
        "16": {"runtime": "onnxruntime", "dtype": "fp32"},
    }
    assert [row[6] for row in benchmark_table(record)] == ["vs fastest base", "0.75x", "2.50x", "2.00x", "6.00x"]
    assert "fastest base, batch 1: channels_last in bf16" in benchmark_text(record)


class Net(nn.Module):
    """Four layers whose MACs are counted by hand, for images of 3 x 4 x 4 and 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"image_size": [3, 4, 4], "num_labels": 10})
        self.conv, self.deep = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.fc, self.head = nn.Linear(64, 68), nn.Linear(68, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.deep(self.conv(pixels)).mean((2, 3))))


def test_layer_shares_match_hand_computed_macs() -> None:
    # 64 x 3 x 16 + 64 x 9 x 16 + 64 x 68 + 68 x 10 MACs; 68 is not a multiple of 8; no width is below 64.
    total = 3072 + 9216 + 4352 + 680
    layers = describe_layers(Net())
    assert layers["depthwise"] == pytest.approx(9216 / total)
    assert layers["narrow"] == 0
    assert (layers["convolutions"], layers["unblocked"]) == (2, 0)
    assert layers["unaligned"] == pytest.approx(dict.fromkeys(("8", "16", "32"), (4352 + 680) / total))
    odd = Net()
    odd.deep = nn.Conv2d(64, 60, 3, padding=1)
    odd.fc = nn.Linear(60, 68)
    layers = describe_layers(odd)
    assert (layers["convolutions"], layers["unblocked"]) == (2, 1)


@pytest.mark.benchmarks
def test_benchmark_is_saved_and_shown_on_card(
    pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isoprune_hf.measuring.timing.find_load", lambda passes, on_cpu: None)
    folder = shutil.copytree(pruned("vit").folder, tmp_path / "vit")
    (folder / "speed.json").write_text(
        '{"milliseconds": {"base": 5.0}, "device": "cpu", "threads": 1, "batch_size": 1}'
    )
    flags = ["--base", _dense(pruned, tmp_path), "--batch_sizes", "[1,2]", "--repeats", "5", "--threads", "1"]
    done = isoprune("benchmark", folder, *flags, "--runtimes", "[eager,onnxruntime]", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    speed = read(folder, "speed.json")
    record = speed["benchmark"]
    assert speed["milliseconds"] == {"base": 5.0}
    cases = [(row["runtime"], row["dtype"], row["batch_size"]) for row in record["rows"]]
    assert cases == [("eager", d, n) for d in ("fp32", "bf16") for n in (1, 2)] + [
        ("onnxruntime", "fp32", n) for n in (1, 2)
    ]
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
    assert "](speed.png)" in card and (folder / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.benchmarks
def test_exported_int8_is_a_row_of_its_own(
    pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isoprune_hf.measuring.timing.find_load", lambda passes, on_cpu: None)
    folder, out = shutil.copytree(pruned("vit").folder, tmp_path / "vit"), tmp_path / "int8"
    assert isoprune("export", folder, "--precision", "int8-dynamic", "--output", out).code == 0
    flags = ["--base", _dense(pruned, tmp_path), "--batch_sizes", "[1,2]", "--dtypes", "[fp32]", "--repeats", "5"]
    flags += ["--threads", "1", "--runtimes", "[eager]", "--device", "cpu"]
    done = isoprune("benchmark", folder, *flags, "--exported", f"[{out}]")
    assert (done.code, done.err) == (0, "")
    rows = read(folder, "speed.json")["benchmark"]["rows"]
    cases = [(row["runtime"], row["dtype"], row["batch_size"]) for row in rows]
    assert cases == [("eager", "fp32", 1), ("eager", "fp32", 2)] + [("onnxruntime", "int8-dynamic", n) for n in (1, 2)]
    assert [row.get("is_exported", False) for row in rows] == [False, False, True, True]
    assert done.out.count("ONNX Runtime, exported  int8-dynamic") == 2
    for row in rows[2:]:
        bases = [other["base"]["median"] for other in rows if other["batch_size"] == row["batch_size"]]
        assert row["of_fastest"] == pytest.approx(min(bases) / row["pruned"]["median"])
    record = read(out, "export.json")
    (out / "export.json").write_text(json.dumps(record | {"weights": "0" * 64}))
    assert "other weights" in refuse("benchmark", folder, *flags, "--exported", f"[{out}]")
    (out / "export.json").write_text(json.dumps(record | {"format": "torch-export"}))
    assert "onnx and openvino are timed" in refuse("benchmark", folder, *flags, "--exported", f"[{out}]")
    assert "isoprune export wrote" in refuse("benchmark", folder, *flags, "--exported", f"[{folder}]")


def _dense(pruned: Callable[[str], Pruned], tmp_path: Path) -> Path:
    """Save the base of the tiny ViT and return its folder."""
    base = make_base("vit", tmp_path / "bases", labels=7)
    sample = pruned("vit")
    base.config.id2label, base.config.label2id = sample.model.config.id2label, sample.model.config.label2id
    base.save_pretrained(tmp_path / "base")
    sample.processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_refused_benchmark_leaves_folder_unchanged(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
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
