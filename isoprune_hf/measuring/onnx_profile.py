"""Time the layers of a model inside ONNX Runtime, by its own profile: `time_onnx_layers`."""

import ast
import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.images import draw_images
from isoprune_hf.measuring.runtimes.onnx_runtime import convert_onnx, save_onnx
from isoprune_hf.measuring.tracing import output_names, plain_copy, trace_model

_NETWORK = "model.model."  # from the traced module to the network
_SCOPES = "pkg.torch.onnx.name_scopes"
_ENDING = "_kernel_time"
_PRODUCTS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")
_WARMUP = 3


class Node(NamedTuple):
    """An operation of the exported graph.

    Attributes:
        op: Its type.
        name: Its name.
        inputs: Names of its input values.
        outputs: Names of its output values.
        scopes: Modules in which it was called, the innermost last.
    """

    op: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    scopes: Sequence[str]


class LayerTimes(NamedTuple):
    """Milliseconds of the layers of a model in a pass, and of all of its kernels."""

    layers: dict[str, float]
    total: float


class Kernel(NamedTuple):
    """A kernel of ONNX Runtime, which may do the work of several operations."""

    name: str
    op: str


def time_onnx_layers(
    model: IsoPruneForImageClassification,
    image_size: Sequence[int],
    layers: Collection[str],
    *,
    batch_size: int,
    threads: int,
    repeats: int,
) -> LayerTimes:
    """Return the milliseconds of each layer, 0 for one without a kernel, and of all kernels of a pass.

    Args:
        model: The model in eval mode; it is not changed.
        image_size: (C, H, W) of one image.
        layers: Names of modules of `model.model`.
        batch_size: Images in the batch.
        threads: Threads of one operator.
        repeats: Timed passes.
    """
    program = trace_model(plain_copy(model), draw_images(model, image_size, 2).float().cpu())
    converted = convert_onnx(program, output_names(model))
    pixels = draw_images(model, image_size, batch_size).float().cpu().numpy()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save_onnx(converted, program, file)
        events = _profile(file, pixels, threads=threads, passes=_WARMUP + repeats)
    length = len(events) // (_WARMUP + repeats)  # every pass runs the same kernels
    kernels = [Kernel(event["name"].removesuffix(_ENDING), event["args"]["op_name"]) for event in events[:length]]
    owners = assign_kernels(kernels, _nodes_of(converted.model.graph), layers)
    # Kernels are so short that other programs rarely interrupt one of them, but often a whole pass.
    times = [
        _typical([event["dur"] for event in events[place + _WARMUP * length :: length]]) for place in range(length)
    ]
    spent = dict.fromkeys(layers, 0.0)
    for owner, time in zip(owners, times, strict=True):
        if owner is not None:
            spent[owner] += time
    return LayerTimes(spent, sum(times))


def _typical(microseconds: Sequence[float]) -> float:
    """Return the mean of the faster half of some times, in milliseconds; a median of whole numbers would be coarse."""
    return statistics.mean(sorted(microseconds)[: (len(microseconds) + 1) // 2]) / 1000


def assign_kernels(kernels: Sequence[Kernel], nodes: Iterable[Node], layers: Collection[str]) -> list[str | None]:
    """Return the layer of each kernel, or None for a kernel that belongs to none.

    A kernel bears the name of an operation or of a value: the last one of those that were fused. A kernel of a product
    belongs to the layer of the product among them; the search ends at the results of other kernels. Any other kernel
    belongs to the innermost layer in which its operation was called.
    """
    by_name: dict[str, Node] = {}
    for node in nodes:
        by_name |= dict.fromkeys((node.name, *node.outputs), node)
    ends = [by_name.get(kernel.name.partition("/")[0].removesuffix("_nchwc")) for kernel in kernels]
    results = {name for end in ends if end is not None for name in end.outputs}
    return [
        None if end is None else _owner(_find_product(kernel, end, by_name, results), layers)
        for kernel, end in zip(kernels, ends, strict=True)
    ]


def _find_product(kernel: Kernel, end: Node, by_name: Mapping[str, Node], results: Collection[str]) -> Node:
    """Return the product that a kernel computes; for other kernels the operation itself."""
    waiting, seen = [end], {end.name}
    while kernel.op in _PRODUCTS and waiting:
        node = waiting.pop(0)
        if node.op in _PRODUCTS:
            return node
        for value in node.inputs:
            before = by_name.get(value)
            if before is not None and value not in results and before.name not in seen:
                seen.add(before.name)
                waiting.append(before)
    return end


def _owner(node: Node, layers: Collection[str]) -> str | None:
    """Return the layer whose weight an operation reads, or the innermost one in which it was called.

    A convolution that the exporter has merged with a BatchNorm counts as called in the latter.
    """
    weights = (value.removesuffix(".weight") for value in node.inputs if value.endswith(".weight"))
    names = (scope.removeprefix(_NETWORK) for scope in (*weights, *reversed(node.scopes)))
    return next((name for name in names if name in layers), None)


def _nodes_of(graph: Iterable[Any]) -> list[Node]:
    """Return the operations of a graph of torch's exporter."""
    return [
        Node(
            node.op_type,
            node.name,
            [value.name for value in node.inputs if value is not None],
            [value.name for value in node.outputs],
            ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")),
        )
        for node in graph
    ]


def _profile(file: Path, pixels: Any, *, threads: int, passes: int) -> list[dict[str, Any]]:
    """Run a model, and return the events of its kernels in their order."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    options.enable_profiling = True
    options.profile_file_prefix = str(file.with_name("profile"))
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for _ in range(passes):
        session.run(["logits"], {"pixel_values": pixels})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_ENDING)]
