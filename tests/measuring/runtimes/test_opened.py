"""Models in every runtime: they answer as in PyTorch, and are left as they were."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from torch import nn

from isoprune_hf.errors import RecipeError
from isoprune_hf.measuring.runtimes import opened
from isoprune_hf.measuring.runtimes.engine import OpenModel, Runtime
from isoprune_hf.measuring.runtimes.opened import cpu_threads, open_models
from isoprune_hf.measuring.runtimes.registry import ENGINES, missing_packages
from isoprune_hf.measuring.timing import Rounds


class Engine:
    """Counts the threads of PyTorch at every pass."""

    min_warmup = 0

    def __init__(self) -> None:
        self.threads: list[int] = []

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def open(self, model: nn.Module, images: torch.Tensor, runtime: Runtime) -> OpenModel:
        assert not model.training and images.shape == (2, 3, 4, 4)
        return OpenModel(lambda pixels: lambda: self.threads.append(torch.get_num_threads()), "not folded")


def test_models_are_opened_with_threads_and_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, before = Engine(), torch.get_num_threads()
    monkeypatch.setitem(opened.ENGINES, "eager", engine)
    model = nn.Conv2d(3, 1, 1).train()
    with open_models({"base": model}, (3, 4, 4), Runtime(threads=before + 1)) as models:
        models.time(1, Rounds(2, 0))
        assert models.notes == ("base: not folded",)
    assert engine.threads == [before + 1] * 2
    assert model.training and torch.get_num_threads() == before


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RecipeError), cpu_threads(before + 1):
        raise RecipeError("no")
    assert torch.get_num_threads() == before


def test_limitations_name_what_is_missing() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    onnx = ENGINES["onnxruntime"]
    assert onnx.limitation("fp32", cpu) is None
    assert onnx.limitation("bf16", cpu) == "its CPU kernels are of fp32"
    assert {ENGINES[name].limitation("fp32", cuda) for name in ("onnxruntime", "openvino")} == {
        "measured on the CPU only"
    }
    assert [ENGINES[name].limitation("bf16", cuda) for name in ("eager", "channels_last", "compile")] == [None] * 3


def test_missing_package_of_a_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_packages("eager") == ()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert missing_packages("onnxruntime") == ("onnxruntime",)


@pytest.mark.parametrize(
    "name",
    [
        "eager",
        "channels_last",
        pytest.param("onnxruntime", marks=pytest.mark.export),
        pytest.param("compile", marks=pytest.mark.families),
        pytest.param("openvino", marks=pytest.mark.export),
    ],
)
def test_runtime_answers_as_pytorch_does(name: str, tmp_path: Path) -> None:
    base = make_base("resnet", tmp_path)
    pixels = torch.randn(3, 3, *base.config.image_size[1:])
    with open_models({"base": base}, pixels.shape[1:], Runtime(name)) as models:
        found = models.opened["base"].bind(pixels)()
    with torch.no_grad():
        expected = base.eval()(pixels).logits
    answer = torch.as_tensor(getattr(found, "logits", found))
    torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-4)
