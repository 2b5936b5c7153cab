"""Edited copies of pruned folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.folders import config_of


@pytest.fixture
def edited(pruned, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a pruned folder and edits its config.json in place."""

    def give(edit: Callable[[dict[str, Any]], Any] = lambda config: None, family: str = "vit") -> Path:
        folder = give.folder = tmp_path / "edited"
        shutil.copytree(pruned(family).folder, folder)
        config = config_of(folder)
        edit(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return give
