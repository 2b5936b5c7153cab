"""The engines by name, and which of them this machine has."""

from collections.abc import Mapping
from importlib.util import find_spec

from isoprune_hf.measuring.runtimes.channels_last import ChannelsLastEngine
from isoprune_hf.measuring.runtimes.eager import CompileEngine, EagerEngine
from isoprune_hf.measuring.runtimes.engine import Engine
from isoprune_hf.measuring.runtimes.onnx_runtime import OnnxRuntimeEngine
from isoprune_hf.measuring.runtimes.openvino import OpenVinoEngine
from isoprune_hf.recipes.values import RuntimeName

ENGINES: Mapping[RuntimeName, Engine] = {
    "eager": EagerEngine(),
    "channels_last": ChannelsLastEngine(),
    "compile": CompileEngine(),
    "onnxruntime": OnnxRuntimeEngine(),
    "openvino": OpenVinoEngine(),
}


def missing_packages(name: RuntimeName) -> tuple[str, ...]:
    """Return the packages of a runtime that are not installed."""
    return tuple(package for package in ENGINES[name].packages if find_spec(package) is None)
