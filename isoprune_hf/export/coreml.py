"""Export to Core ML for Apple's devices. Its runtime exists on macOS alone; elsewhere the file is checked, not run."""

import io
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isoprune_hf.errors import ExportError
from isoprune_hf.export.values import LOGITS, ExportPrecision, Quantizer
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.measuring.tracing import side_by_side

_LAYERS = ("aten.conv2d.default", "aten.linear.default")


class CoreMlFormat:
    """An ML program in a package of Core ML, which is a folder."""

    file = "model.mlpackage"
    packages = ("coremltools",)
    takes_batches = True
    limitation = None if sys.platform == "darwin" else "Core ML runs on macOS alone"
    floats: tuple[ExportPrecision, ...] = ("fp32",)
    quantizers: Mapping[ExportPrecision, Quantizer] = {}
    script = (
        "coremltools",
        'coremltools.models.MLModel(str(folder / "model.mlpackage")).predict({"pixel_values": pixels})["$name"]',
    )

    def write(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        labels: Mapping[int, str],
        outputs: Sequence[str] = LOGITS,
    ) -> Run | None:
        """Write a traced model and open it again on macOS; see `ExportFormat.write`.

        Raises:
            ExportError: The file has other inputs, outputs, labels or weights than the model.
        """
        tools = import_module("coremltools")
        with redirect_stderr(io.StringIO()):  # progress
            converted = tools.convert(
                program.run_decompositions({}),
                convert_to="mlprogram",
                compute_precision=tools.precision.FLOAT32,
                minimum_deployment_target=tools.target.iOS16,
                outputs=[tools.TensorType(name=name) for name in outputs],
                skip_model_load=True,
            )
        converted.user_defined_metadata["id2label"] = json.dumps(labels)
        converted.save(str(file))
        _check(tools.models.MLModel(str(file), skip_model_load=True).get_spec(), program, labels, outputs)
        if self.limitation is not None:
            return None
        opened = tools.models.MLModel(str(file))

        def run(pixels: np.ndarray) -> np.ndarray:
            found = opened.predict({"pixel_values": pixels})
            return side_by_side([found[name] for name in outputs])

        return run


def _check(
    spec: Any, program: torch.export.ExportedProgram, labels: Mapping[int, str], outputs: Sequence[str]
) -> None:
    """Check the specification of a saved model against the traced one."""
    (images, *_), _ = program.example_inputs
    names = ([entry.name for entry in spec.description.input], [entry.name for entry in spec.description.output])
    sizes = spec.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    shape = [(size.lowerBound, size.upperBound) for size in sizes]
    stored = json.loads(spec.description.metadata.userDefined["id2label"])
    missing = _weights(program) - _constants(spec)
    if names != (["pixel_values"], [*outputs]):
        raise ExportError(
            f"the file of coreml has the inputs and outputs {names}, not pixel_values and {' and '.join(outputs)}"
        )
    if [low for low, _ in shape] != [1, *images.shape[1:]] or [high for _, high in shape][1:] != [*images.shape[1:]]:
        raise ExportError(f"the file of coreml reads images of the sizes {shape}, not {[*images.shape[1:]]}")
    if stored != {str(index): name for index, name in labels.items()}:
        raise ExportError("the file of coreml has other labels than the model")
    if missing:
        raise ExportError(f"the file of coreml lacks weights of the shapes {sorted(missing)}")


def _weights(program: torch.export.ExportedProgram) -> Counter[tuple[int, ...]]:
    """Return how many convolutions and linear layers of a traced model have weights of each shape."""
    names = program.graph_signature.inputs_to_parameters
    layers = [node for node in program.graph.nodes if str(node.target) in _LAYERS]
    used = {names[node.args[1].name] for node in layers if node.args[1].name in names}
    return Counter(tuple(program.state_dict[name].shape) for name in used)


def _constants(spec: Any) -> Counter[tuple[int, ...]]:
    """Return how many constants of an ML program have each shape."""
    functions = spec.mlProgram.functions.values()
    blocks = [block for function in functions for block in function.block_specializations.values()]
    operations = [operation for block in blocks for operation in block.operations]
    values = [each.attributes["val"].type.tensorType for each in operations if each.type == "const"]
    return Counter(tuple(size.constant.size for size in value.dimensions) for value in values)
