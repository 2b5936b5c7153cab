"""The shipped file opens with every transformers that it can use, and names the version otherwise."""

import configparser
import re
from pathlib import Path

import pytest
import transformers

from isoprune_hf.checkpoint.modeling_isoprune import code_that_ships
from isoprune_hf.checkpoint.needed import NEEDED


@pytest.mark.parametrize("version", ["4.57.6", "5.2.0", "5.22.1"])
def test_older_transformers_is_named_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"^this model needs transformers {NEEDED} or later, {version} is .*\"$"):
        exec(compile(code_that_ships(), "modeling_isoprune.py", "exec"), {"__name__": "modeling_isoprune"})


def test_needed_version_is_that_of_the_package() -> None:
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[2] / "setup.cfg")
    assert f"transformers>={NEEDED}," in settings["options"]["install_requires"]
    first = re.search(r"^from transformers", code_that_ships(), re.MULTILINE)
    assert first and code_that_ships().index("raise ImportError(") < first.start()
