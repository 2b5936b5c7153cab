"""Optional packages and the extra of `pip install isoprune-hf[EXTRA]` that installs each.

Call `require_package` to import one of them, or wrap imports in `naming_extra`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from isoprune_hf.errors import MissingExtraError

EXTRAS = {
    "accelerate": "prune",
    "datasets": "prune",
    "evaluate": "prune",
    "jsonargparse": "prune",
    "pyarrow": "prune",
    "shtab": "prune",
    "torch_pruning": "prune",
    "psutil": "prune",
    "scipy": "prune",
    "torchmetrics": "detection",
    "pycocotools": "detection",
    "sklearn": "train",
    "matplotlib": "publish",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "openvino",
    "nncf": "openvino",
    "executorch": "executorch",
    "torchao": "executorch",
    "litert_torch": "litert",
    "ai_edge_litert": "litert",
    "coremltools": "coreml",
}


@contextmanager
def naming_extra(user: str, extra: str | None = None) -> Iterator[None]:
    """Translate the failed import of an optional package into one line with the command that installs it.

    Args:
        user: Feature that needs the package; the subject of the message.
        extra: Extra to name, if this feature gets the package from another extra than `EXTRAS` lists.

    Raises:
        MissingExtraError: An optional package is not installed. Other packages still raise `ModuleNotFoundError`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtraError(
            f"{user} needs {package}, which is not installed: pip install isoprune-hf[{extra or EXTRAS[package]}]"
        ) from error


def require_package(name: str, user: str, extra: str | None = None) -> ModuleType:
    """Import an optional package; arguments and errors are those of `naming_extra`."""
    with naming_extra(user, extra):
        return import_module(name)
