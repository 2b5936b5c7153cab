"""Name the settings that a command must give to resolve to known values: `named_settings`, `as_flags`."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from isoprune_hf.recipes.presets import PRESETS, default_settings
from isoprune_hf.recipes.prune import PruneRecipe
from isoprune_hf.recipes.values import recipe_to_dict


def named_settings(recipe_type: Any, values: Mapping[str, Any], *, has_images: bool) -> dict[str, Any]:
    """Return the settings of a section that differ from the values that they have if they are not named.

    Args:
        recipe_type: Class of the section.
        values: Setting -> value, as `recipe_to_dict` returns them; unknown settings are left out.
        has_images: The command that names them has images, on which defaults of the section prune depend.
    """
    defaults = recipe_to_dict(recipe_type())
    if recipe_type is PruneRecipe:
        defaults |= default_settings(values.get("criterion"), has_images=has_images)
        defaults["criterion"] = PRESETS["best"]["criterion"]
    return {name: value for name, value in values.items() if name in defaults and value != defaults[name]}


def as_flags(section: str, settings: Mapping[str, Any]) -> list[str]:
    """Return settings as the words of a command line, quoted for a shell."""
    return [
        word
        for name, value in settings.items()
        for word in (f"--{section}.{name}", shlex.quote(value if isinstance(value, str) else json.dumps(value)))
    ]
