"""Parts of all recipes: ranges of numbers, plain values for JSON and YAML, the identity of a resumable run."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Final, Literal, get_args, get_origin

from isoprune_hf.errors import RecipeError

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Precision = Literal["no", "bf16"]  # of a forward pass: fp32, or bf16
RuntimeName = Literal["eager", "channels_last", "compile", "onnxruntime", "openvino"]
DType = Literal["fp32", "bf16"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]  # of transformers
ONE_CLASS: Final = "single_label_classification"
MULTI_LABEL: Final = "multi_label_classification"
# Field metadata of settings that do not change the result: a run resumes although they differ.
IGNORED_FOR_RESUME = MappingProxyType({"ignored_for_resume": True})


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have. Infinity and nan are in no range.

    Args:
        low: Smallest number.
        high: Largest number.
        whole: Only whole numbers.
        excluded: `low` or `high`, if that number itself is not allowed.
        or_text: The setting may also be a text, or a list of texts, which other code checks.
    """

    low: float
    high: float
    whole: bool = False
    excluded: float | None = None
    or_text: bool = False

    def __contains__(self, value: object) -> bool:
        """Return whether a value is a number in the range; those of numpy are none, as JSON has no text for them."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low <= value <= self.high and value != self.excluded

    def __str__(self) -> str:
        """Return the range in words, such as `between 0 and 1`."""
        kind = "a whole number " if self.whole else ""
        if self.excluded is None:
            return f"{kind}between {self.low} and {self.high}"
        low = "above" if self.excluded == self.low else "at least"
        high = "below" if self.excluded == self.high else "at most"
        return f"{kind}{low} {self.low} and {high} {self.high}"


SHARE = Range(0, 1)
SHARE_BELOW_ONE = Range(0, 1, excluded=1)
MINUTES = Range(0, 10**6)  # about two years
SEED = Range(0, 2**63 - 1, whole=True)
IMAGES = Range(1, 2**24, whole=True)  # in a batch


def whole(low: int, high: int) -> Range:
    """Return the range of the whole numbers from `low` to `high`."""
    return Range(low, high, whole=True)


def above_zero(high: float) -> Range:
    """Return the range of the numbers above 0 up to `high`."""
    return Range(0, high, excluded=0)


def check_numbers(section: str, recipe: Any, ranges: Mapping[str, Range]) -> None:
    """Check every number of a recipe, also those in lists and mappings; settings that are None are not set.

    Args:
        section: Section of the recipe, for error messages.
        recipe: The recipe.
        ranges: Setting -> its range.

    Raises:
        RecipeError: A number is not finite or out of its range.
    """
    for setting, allowed in ranges.items():
        for name, value in _values(setting, getattr(recipe, setting)):
            is_text = allowed.or_text and isinstance(value, str)
            if not is_text and value not in allowed:
                raise RecipeError(f"{section}.{name} must be {allowed}, got {shorten(value)}")


def check_choices(section: str, recipe: Any) -> None:
    """Check every setting of a recipe that takes one of some words; settings that are None are not set.

    Args:
        section: Section of the recipe, for error messages.
        recipe: The recipe.

    Raises:
        RecipeError: A word is none of those of its setting.
    """
    for setting in fields(recipe):
        value, parts = getattr(recipe, setting.name), _without_none(setting.type)
        words = [word for part in parts for word in get_args(part)]
        takes_words = bool(parts) and all(get_origin(part) is Literal for part in parts)
        if takes_words and value is not None and value not in words:
            raise RecipeError(f"{section}.{setting.name} must be one of {', '.join(words)}, got {shorten(value)}")


def _without_none(kind: Any) -> list[Any]:
    """Return the types of a union without None, or the type itself."""
    return [kind] if get_origin(kind) is Literal else [part for part in get_args(kind) if part is not type(None)]


def _values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values of a setting with their names; none for None."""
    if isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", inner) for key, inner in value.items())
    elif isinstance(value, list | tuple):
        yield from ((name, inner) for inner in value)
    elif value is not None:
        yield name, value


def shorten(value: object) -> str:
    """Return a value as text; of a long whole number, whose text Python may refuse to make, the number of bits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.99}"


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """Convert a recipe to plain values for JSON and YAML."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}


def resume_identity(recipe: Any) -> dict[str, Any]:
    """Return the plain values of the settings that must be equal for a run to be resumed.

    Settings whose field metadata is `IGNORED_FOR_RESUME` are left out.
    """
    ignored = {setting.name for setting in fields(recipe) if setting.metadata.get("ignored_for_resume")}
    return {name: value for name, value in recipe_to_dict(recipe).items() if name not in ignored}
