"""An int8 export to ExecuTorch has eight-bit weights, and layers in fp32 only where it needs them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import isoprune, read
from helpers.pruned_models import LABELS, Pruned
from PIL import Image

from isoprune_hf.export import bounded_int8
from isoprune_hf.measuring.tracing import plain_copy, run_traced, trace_model

pytestmark = pytest.mark.export
pytest.importorskip("executorch")  # brings torchao
from isoprune_hf.export.pt2e_int8 import quantize_traced  # noqa: E402


def draw(sample: Pruned, count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *sample.images.shape[1:]), dtype=np.float32)


def weights_of(program: torch.export.ExportedProgram) -> list[torch.Tensor]:
    """Return the tensors of a quantised program that are stored in eight bits."""
    return [tensor for tensor in program.state_dict.values() if tensor.dtype == torch.int8]


def layers_of(sample: Pruned) -> list[torch.Tensor]:
    """Return the weights of the convolutions and linear layers of a model."""
    kinds = torch.nn.Conv2d | torch.nn.Linear
    return [layer.weight.detach() for layer in sample.model.modules() if isinstance(layer, kinds)]


def test_rounded_weights_are_those_computed_by_hand(
    pruned: Callable[[str], Pruned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_int8, "MAX_DIVERGENCE", np.inf)
    sample = pruned("vit")
    pixels, plain = draw(sample, 8), plain_copy(sample.model)
    program = trace_model(plain, torch.from_numpy(pixels))
    quantized, record = quantize_traced(program, [pixels[:4], pixels[4:]])
    found = weights_of(quantized)
    for dense in layers_of(sample):
        scales = dense.flatten(1).abs().amax(1).reshape(-1, *[1] * (dense.ndim - 1)) / 127
        rounded = (dense / scales).round().to(torch.int8)
        assert any(weights.shape == dense.shape and weights.equal(rounded) for weights in found)
    assert record | {"divergence": 0} == {
        "always_out": [],
        "calibration_images": 6,
        "divergence": 0,
        "held_out_images": 2,
        "left_out": [],
        "share_of_weights": 1,
    }
    expected, logits = run_traced(plain, pixels[:1]), quantized.module()(torch.from_numpy(pixels[:1])).detach().numpy()
    assert 0 < abs(logits - expected).max() < 0.1 * abs(expected).max()


def test_sensitive_layers_of_executorch_stay_fp32(
    pruned: Callable[[str], Pruned], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = pruned("resnet")
    pixels = draw(sample, 8)
    program = trace_model(plain_copy(sample.model), torch.from_numpy(pixels))
    monkeypatch.setattr(bounded_int8, "MAX_DIVERGENCE", np.inf)
    whole, everything = quantize_traced(program, [pixels])
    monkeypatch.setattr(bounded_int8, "MAX_DIVERGENCE", 0.8 * everything["divergence"])
    part, record = quantize_traced(program, [pixels])
    assert record["left_out"] and 0 < record["divergence"] <= bounded_int8.MAX_DIVERGENCE
    sizes = [sum(map(torch.numel, weights_of(quantized))) for quantized in (whole, part)]
    assert sizes[1] == pytest.approx(record["share_of_weights"] * sizes[0], rel=0.01)


def test_executorch_evaluates_its_model_in_int8(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in LABELS.values():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(3):
                coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                coarse.resize((48, 40)).save(tmp_path / "data" / split / name / f"{number}.png")
    out = tmp_path / "out"
    flags = ["--precision", "int8", "--data", tmp_path / "data", "--calibration_images", "10"]
    folder = pruned("resnet").folder
    words = ["export", folder, "--format", "executorch", *flags, "--data.num_workers", "0", "--output", out]
    assert isoprune(*words).code == 0  # the runtime may print lines on the processor
    record, metrics = read(out, "export.json"), read(out, "metrics.json")
    assert {"executorch", "torchao"} < record["versions"].keys()
    assert 0 < record["quantization"]["divergence"] <= 2 * bounded_int8.MAX_DIVERGENCE
    assert 1e-4 < record["difference"] / record["largest"] < 0.25
    assert metrics["pruned+int8"]["agreement"] >= 0.8
    assert metrics["pruned+int8"]["file_mb"] == (out / "model.pte").stat().st_size / 1e6
