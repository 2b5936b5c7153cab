"""Folders that the tests of several stages read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cut_folders import write_cuts


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the cuts `small`, `large` and `other`; tests that change one copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return write_cuts(tmp_path_factory.mktemp("folders"))
