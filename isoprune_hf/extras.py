"""Packages that only some of the work needs, and the extra of `pip install isoprune-hf[EXTRA]` that brings each."""

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
    "xxhash": "prune",
    "sklearn": "train",
    "matplotlib": "publish",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "export",
}


@contextmanager
def naming_extra(what: str, extra: str | None = None) -> Iterator[None]:
    """Turn the failed import of a package of an extra into one line that says what to install.

    Args:
        what: What needs the package.
        extra: The extra that brings it for this, where another one brings it for other work.

    Raises:
        MissingExtraError: It is not installed. A package of no extra stays a `ModuleNotFoundError`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed: pip install isoprune-hf[{extra or EXTRAS[package]}]"
        ) from error


def require_package(name: str, what: str, extra: str | None = None) -> ModuleType:
    """Import a package of an extra; see `naming_extra`."""
    with naming_extra(what, extra):
        return import_module(name)
