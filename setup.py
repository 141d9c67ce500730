"""What setup.cfg cannot say: a wheel has the recipes beside dpft's modules, from where `dpft recipes` copies them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """The names and the place are those of ``dpft/command_line/recipes.py``."""

    def run(self) -> None:
        """Copy, but for an editable install, which finds the recipes where they are."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "dpft", "_recipes")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree("recipes", target / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy("accelerate_config.yaml", target)


setup(cmdclass={"build_py": BuildWithRecipes})
