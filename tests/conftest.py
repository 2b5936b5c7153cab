"""How the suite collects garbage, and the fixtures of all tests, which `helpers.fixtures` holds."""

import gc

import pytest

_OBJECTS_PER_COLLECTION = 200_000  # Python's 700 take a tenth of the time of the whole suite


def pytest_configure(config: pytest.Config) -> None:
    """Collect garbage rarely, and not before all is imported; import the package where tests run."""
    gc.set_threshold(_OBJECTS_PER_COLLECTION)
    gc.disable()
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("helpers.fixtures")


def pytest_collection_finish() -> None:
    """Leave the imported modules out of all garbage collections: each would take a quarter of a second."""
    gc.freeze()
    gc.enable()
