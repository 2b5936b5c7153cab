"""The metadata is in setup.cfg; this file adds the recipes of the top folder to the wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copy `recipes/*.yaml` to `isoprune_hf/recipes/published`; an editable installation reads the top folder."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            published = Path(self.build_lib, "isoprune_hf", "recipes", "published")
            self.mkpath(str(published))
            for recipe in sorted(Path("recipes").glob("*.yaml")):
                self.copy_file(str(recipe), str(published / recipe.name))


setup(cmdclass={"build_py": BuildWithRecipes})
