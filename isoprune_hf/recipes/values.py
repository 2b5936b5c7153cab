"""The values of a recipe: range checks, sizes and times as people write them, plain values for JSON and YAML."""

import re
from dataclasses import asdict
from typing import Any, Literal

from isoprune_hf.errors import RecipeError

Interpolation = Literal["nearest", "bilinear", "bicubic"]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MILLISECONDS = {"": 1.0, "US": 1e-3, "MS": 1.0, "S": 1e3}


def check_range(section: str, name: str, value: float | None, low: float, high: float | None = None) -> None:
    """Raise a RecipeError unless a value that is set lies from `low` to `high`."""
    if value is None or (value >= low and (high is None or value <= high)):
        return
    allowed = f"at least {low}" if high is None else f"between {low} and {high}"
    raise RecipeError(f"{section}.{name} must be {allowed}, got {value}")


def parse_budget(budget: str | float, base: float, name: str = "target_macs") -> float:
    """Read a size or a time as people write it.

    Args:
        budget: `4.2G`, `350M`, `12ms`, a plain number, or a share of the base such as `50%`.
        base: The same quantity of the base.
        name: Setting that is named in the error; one that ends in latency is a time.

    Returns:
        The budget: a whole number of units, or milliseconds.

    Raises:
        RecipeError: It is no such size or time, or not above zero.
    """
    is_time = name.endswith("latency")
    units = _MILLISECONDS if is_time else _UNITS
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*|%)\s*", str(budget), re.IGNORECASE)
    unit = match[2].upper() if match else None
    if match is None or float(match[1]) <= 0 or unit not in {*units, "%"}:
        example = "a time such as 12ms, 0.5s or 50%" if is_time else "a size such as 4.2G, 350M or 50%"
        raise RecipeError(f"{name} must be {example}, got {budget!r}")
    value = base * float(match[1]) / 100 if unit == "%" else float(match[1]) * units[unit]
    return value if is_time else round(value)


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """Turn a recipe into plain values for JSON and YAML."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
