"""The settings of a training without labels, which a teacher alone can give: `check_unlabelled`."""

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes import FinetuneRecipe


def check_unlabelled(recipe: FinetuneRecipe, *, has_teacher: bool) -> None:
    """Check the settings of a training whose loss is the distance from the outputs of a teacher.

    Args:
        recipe: How to train.
        has_teacher: There is a teacher.

    Raises:
        RecipeError: There is no teacher, or a setting is for classes.
    """
    name = recipe.section
    if not has_teacher or "none" in (recipe.distillation, recipe.teacher):
        raise RecipeError(
            f"{name}: a network without labels learns from a teacher alone, and there is none "
            f"(teacher {recipe.teacher}, distillation {recipe.distillation}); use teacher auto and distillation soft "
            f"with a trained base, or set {name}.epochs 0"
        )
    for setting, plain in (("distillation", "soft"), ("distillation_head", "logits"), ("teacher_cache", None)):
        value = getattr(recipe, setting)
        if value != plain:
            raise RecipeError(f"{name}.{setting} {value} is for classes, and this network has none; leave it out")
