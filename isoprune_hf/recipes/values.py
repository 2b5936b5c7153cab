"""Helpers that all recipes share: range checks, plain values for JSON and YAML, the identity of a resumable run."""

from dataclasses import asdict, fields
from types import MappingProxyType
from typing import Any, Literal

from isoprune_hf.errors import RecipeError

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Precision = Literal["no", "bf16"]  # of a forward pass: fp32, or bf16
# Field metadata of settings that do not change the result: a run resumes although they differ.
IGNORED_FOR_RESUME = MappingProxyType({"ignored_for_resume": True})


def check_range(section: str, name: str, value: float | None, low: float, high: float | None = None) -> None:
    """Check that a value, if it is set, is at least `low` and at most `high`.

    Raises:
        RecipeError: It is not.
    """
    if value is None or (value >= low and (high is None or value <= high)):
        return
    allowed = f"at least {low}" if high is None else f"between {low} and {high}"
    raise RecipeError(f"{section}.{name} must be {allowed}, got {value}")


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """Convert a recipe to plain values for JSON and YAML."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}


def resume_identity(recipe: Any) -> dict[str, Any]:
    """Return the plain values of the settings that must be equal for a run to be resumed.

    Settings whose field metadata is `IGNORED_FOR_RESUME` are left out.
    """
    ignored = {setting.name for setting in fields(recipe) if setting.metadata.get("ignored_for_resume")}
    return {name: value for name, value in recipe_to_dict(recipe).items() if name not in ignored}
