"""Find the columns of the images, of the classes and of other annotations by their names and types: `find_column`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from datasets import Array3D, ClassLabel, Image, Value

from isoprune_hf.data.label_columns import Split, is_list, label_kind
from isoprune_hf.errors import DatasetError
from isoprune_hf.recipes import DataRecipe

Column = Literal["image_column", "label_column"]
Annotation = Literal["classes", "masks", "boxes"]

# In this order, whatever else there is. The last ones are those of tar files, by the convention of WebDataset.
_USUAL: dict[Column, tuple[str, ...]] = {
    "image_column": ("image", "jpg", "jpeg", "png", "webp"),
    "label_column": ("label", "labels", "class", "target", "cls"),
}
# Columns of images with the class of each pixel, in this order.
_MASKS = ("annotation", "mask", "label", "labels", "segmentation_mask")
MASK = "annotated_mask"  # their name in a split
_OBJECTS = "objects"  # the boxes of an image and their categories, in data sets of the Hub
OBJECTS = "annotated_objects"  # their name in a split
BOX = "bbox"  # the field of their boxes
_NO_LABELS = frozenset({MASK, "mask", "id", "index", "idx", "image_id", "width", "height", "size"})


class NamedColumn(NamedTuple):
    """The column that `data.label_column` names, and its annotations."""

    name: str
    holds: Annotation


def named_column(parts: Iterable[Split], recipe: DataRecipe) -> NamedColumn | None:
    """Return the column of parts of a data set that a recipe names; None for the default setting."""
    name = recipe.label_column
    if name == DataRecipe.label_column:
        return None
    parts = list(parts)
    if any(find_mask_column(part, recipe) == name for part in parts):
        return NamedColumn(name, "masks")
    if any(find_objects_column(part, recipe) == name for part in parts):
        return NamedColumn(name, "boxes")
    return NamedColumn(name, "classes")


def find_column(split: Split, setting: Column, recipe: DataRecipe, place: str) -> str:
    """Return the column that a setting means; with the default setting, the one that its name or its type shows.

    Raises:
        DatasetError: There is no such column, or there are several and nothing tells which is meant.
    """
    features: Mapping[str, Any] = split.features
    wanted: str = getattr(recipe, setting)
    if wanted in features:
        return wanted
    if wanted == getattr(DataRecipe, setting):
        named = [name for name in _USUAL[setting] if name in features and _fits(setting, features[name])]
        typed = _of_type(features, setting)
        if named or len(typed) == 1:
            return (named or typed)[0]
        if typed:
            raise DatasetError(
                f"data.{setting}: split {place!r} of {recipe.dataset!r} has several columns that fit: "
                f"{', '.join(typed)}; choose one with --data.{setting}"
            )
    raise DatasetError(
        f"data.{setting}: split {place!r} of {recipe.dataset!r} has no column {wanted!r}; its columns are "
        f"{', '.join(split.column_names)}"
    )


def has_label_column(split: Split, recipe: DataRecipe) -> bool:
    """Return whether a split has a column that can be meant by `label_column`.

    Beside boxes or masks, numbers and text of other names than usual are no classes of the images.
    """
    features: Mapping[str, Any] = split.features
    named = any(name in features and _fits("label_column", features[name]) for name in _USUAL["label_column"])
    typed = _of_type(features, "label_column")
    if OBJECTS in features or MASK in features:
        typed = [name for name in typed if isinstance(label_kind(features[name]), ClassLabel)]
    return recipe.label_column in features or named or bool(typed)


def find_mask_column(split: Split, recipe: DataRecipe) -> str | None:
    """Return the column of images with the class of each pixel; None if there is none beside the images."""
    features: Mapping[str, Any] = split.features
    names = _MASKS if recipe.label_column == DataRecipe.label_column else (recipe.label_column, *_MASKS)
    images = {name for name, feature in features.items() if isinstance(feature, Image) or is_file(feature)}
    found = [name for name in names if name in images and name != recipe.image_column]
    has_images = any(is_image(feature) or name in images for name, feature in features.items() if name not in found)
    return found[0] if found and has_images else None


def find_objects_column(split: Split, recipe: DataRecipe) -> str | None:
    """Return the column of boxes and their categories; None if there is none."""
    features: Mapping[str, Any] = split.features
    names = (recipe.label_column, _OBJECTS)
    return next((name for name in names if BOX in object_fields(features.get(name))), None)


def object_fields(feature: Any) -> Mapping[str, Any]:
    """Return the types of the fields of objects, lists in a struct or structs in a list; empty for another column."""
    kind = label_kind(feature)
    if not isinstance(kind, Mapping):
        return {}
    return kind if is_list(feature) else {name: label_kind(field) for name, field in kind.items()}


def is_label_name(name: str, recipe: DataRecipe) -> bool:
    """Return whether a column has a name that columns of classes have, or that of the recipe."""
    return name in (recipe.label_column, *_USUAL["label_column"])


def is_mask_name(name: str, recipe: DataRecipe) -> bool:
    """Return whether a column has a name that columns of masks have, or that of the recipe."""
    return name in (recipe.label_column, *_MASKS)


def is_file(feature: Any) -> bool:
    """Return whether a column has encoded files that are not declared as images."""
    return feature == Value("binary") or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})


def is_image(feature: Any) -> bool:
    """Return whether a column is declared as images, or as arrays of uint8."""
    return isinstance(feature, Image) or (isinstance(feature, Array3D) and feature.dtype == "uint8")


def _fits(setting: Column, feature: Any) -> bool:
    if setting == "image_column":
        return is_image(feature) or is_file(feature)
    kind = label_kind(feature)
    return isinstance(kind, ClassLabel) or _is_integer(kind) or _is_text(kind)


def _of_type(features: Mapping[str, Any], setting: Column) -> list[str]:
    """Return the columns of the first kind that there is: declared ones, then those that can only be meant."""
    kinds: tuple[Callable[[Any], bool], ...] = (
        (is_image, lambda feature: isinstance(feature, dict) and is_file(feature))
        if setting == "image_column"
        # Lists of numbers or of texts may be anything, such as boxes or captions.
        else (lambda feature: isinstance(feature, ClassLabel), _is_integer, _is_text, _is_list_of_classes)
    )
    for is_kind in kinds:
        found = [name for name, feature in features.items() if name not in _NO_LABELS and is_kind(feature)]
        if found:
            return [name for name in found if name not in _MASKS or setting == "label_column"] or found
    return []


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and "int" in feature.dtype


def _is_list_of_classes(feature: Any) -> bool:
    return is_list(feature) and isinstance(label_kind(feature), ClassLabel)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
