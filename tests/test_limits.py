"""SECURITY.md states the budgets that the code holds."""

import re
from pathlib import Path

from isoprune_hf import limits

# Constant -> its figure in SECURITY.md.
STATED = {
    "MAX_JSON_BYTES": "files of at most 32 MiB",
    "MAX_NESTING": "nested at most 64 deep",
    "MAX_RECIPE_BYTES": "files of at most 64 KiB",
    "MAX_RECIPE_VALUES": "10,000 values",
    "MAX_RECIPE_FILES": "a chain of 15 files",
    "MAX_CONFIG_NUMBER": "numbers up to 1,048,576",
    "MAX_MODULES": "at most 20,000 modules",
    "MAX_IMAGE_BYTES": "files of more than 1,024 MiB",
    "MAX_IMAGE_SIDE": "sides of at most 16,384",
    "MAX_INPUT_NUMBERS": "67 million numbers",
    "MAX_IMAGE_PIXELS": "more than 67 million pixels",
    "MAX_PROCESSED_SIDE": "numbers above 4,096",
    "MAX_UNSAVED_BYTES": "512 MiB together",
    "MAX_TABLE_BYTES": "at most 128 MiB each",
    "MAX_BUILD_CALLS": "500,000 operations",
    "MAX_BUILD_STEPS": "50,000,000 calls and returns",
    "MAX_BUILD_BYTES": "1,024 MiB of new memory",
    "MAX_PICKLE_BYTES": "At most 16 MiB",
    "MAX_PICKLE_STEPS": "2,000,000 steps",
}
UNITS = {"KiB": 2**10, "MiB": 2**20}


def test_figures_of_security_are_those_held() -> None:
    text = (Path(__file__).parents[1] / "SECURITY.md").read_text(encoding="utf-8")
    held = {name: value for name, value in vars(limits).items() if name.startswith("MAX_")}
    assert held.keys() == STATED.keys()
    for name, figure in STATED.items():
        assert figure in text, figure
        number, unit = re.search(r"([\d,]+) ?(KiB|MiB|million)?", figure).groups()
        value = int(number.replace(",", ""))
        if unit == "million":
            assert held[name] // 10**6 == value
        else:
            assert held[name] - (name == "MAX_RECIPE_FILES") == value * UNITS.get(unit, 1)
