"""A package of Core ML has the inputs, outputs, labels and weights of the model; only macOS runs it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import contents, isoprune, read, refuse
from helpers.pruned_models import LABELS, Pruned

from isoprune_hf.errors import ExportError
from isoprune_hf.export import coreml
from isoprune_hf.export.coreml import CoreMlFormat
from isoprune_hf.export.formats import FORMATS
from isoprune_hf.measuring.tracing import plain_copy, trace_model

ELSEWHERE = pytest.mark.skipif(sys.platform == "darwin", reason="macOS runs Core ML")


@pytest.mark.export
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_package_has_layers_and_names_of_model(family: str, pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    tools = pytest.importorskip("coremltools")
    sample, out = pruned(family), tmp_path / "out"
    done = isoprune("export", sample.folder, "--format", "coreml", "--output", out)
    assert (done.code, done.err) == (0, "")
    spec = tools.models.MLModel(str(out / "model.mlpackage"), skip_model_load=True).get_spec()
    assert [value.name for value in spec.description.input] == ["pixel_values"]
    assert [value.name for value in spec.description.output] == ["logits"]
    names = {str(index): name for index, name in LABELS.items()}
    assert json.loads(spec.description.metadata.userDefined["id2label"]) == names
    operations = [
        each for block in spec.mlProgram.functions["main"].block_specializations.values() for each in block.operations
    ]
    layers = list(sample.model.modules())
    for kind, layer in (("conv", torch.nn.Conv2d), ("linear", torch.nn.Linear)):
        assert sum(each.type == kind for each in operations) == sum(isinstance(module, layer) for module in layers) > 0
    weights = (out / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").read_bytes()
    head = next(module for module in reversed(layers) if isinstance(module, torch.nn.Linear))
    assert head.weight.detach().numpy().astype("<f4").tobytes() in weights
    if sys.platform == "darwin":
        return
    record = read(out, "export.json")
    assert (record["difference"], record["batches"]) == (None, [])
    for text in (done.out, (out / "README.md").read_text()):
        assert "ot compared with PyTorch: Core ML runs on macOS alone" in text
    assert {path.suffix for path in out.iterdir()} == {".mlpackage", ".json", ".md", ".py"}


@pytest.mark.export
@ELSEWHERE
def test_package_without_a_weight_is_refused(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    tools = pytest.importorskip("coremltools")
    sample = pruned("vit")
    pixels = torch.from_numpy(np.zeros((2, *sample.images.shape[1:]), np.float32))
    program = trace_model(plain_copy(sample.model), pixels)
    assert CoreMlFormat().write(program, tmp_path / "model.mlpackage", LABELS) is None
    spec = tools.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True).get_spec()
    coreml._check(spec, program, LABELS)
    with pytest.raises(ExportError, match="other labels"):
        coreml._check(spec, program, {0: "ant"})
    block = next(iter(spec.mlProgram.functions["main"].block_specializations.values()))
    width = sample.model.config.num_labels
    for operation in block.operations:
        if operation.type == "const":
            dimensions = operation.attributes["val"].type.tensorType.dimensions
            if len(dimensions) == 2 and dimensions[0].constant.size == width:
                dimensions[0].constant.size = width + 1
    with pytest.raises(ExportError, match=rf"weights of the shapes \[\({width}, "):
        coreml._check(spec, program, LABELS)
    spec.description.output[0].name = "var_1"
    with pytest.raises(ExportError, match="var_1"):
        coreml._check(spec, program, LABELS)


@ELSEWHERE
def test_accuracy_is_refused_where_nothing_runs(pruned: Callable[[str], Pruned], tmp_path: Path) -> None:
    flags = ["--format", "coreml", "--data", tmp_path, "--output", tmp_path / "out"]
    line = refuse("export", pruned("vit").folder, *flags)
    assert "--data" in line and FORMATS["coreml"].limitation in line
    assert contents(tmp_path) == {}
