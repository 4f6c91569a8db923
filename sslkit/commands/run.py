"""`sslkit run RECIPE`: train a recipe of this package, from images to report."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import tyro

from sslkit.commands.main import refuse, summary, table

USAGE = """usage: sslkit run RECIPE ...

Train a recipe of this package, from images to report.

{recipes}

sslkit run RECIPE --help lists its settings. sslkit cp RECIPE FILE.py copies its file."""


@dataclass(frozen=True)
class _Asked:
    """The preset whose values a help text shows."""

    preset: str = "demo"


def main(arguments: Sequence[str]) -> None:
    """Run a recipe with the settings of the command line."""
    found = recipes()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(recipes=table({name: summary(path) for name, path in found.items()})))
        return
    name, *rest = arguments
    if name not in found:
        refuse("recipe", name, list(found), "sslkit run --help")
    if "--help" in rest or "-h" in rest:
        show_settings(name, rest)
    from sslkit.training.command import main as run_recipe

    run_recipe(import_module(module_of(found[name])).RECIPE, rest, program=f"sslkit run {name}")


def show_settings(name: str, arguments: Sequence[str]) -> None:
    """Print the settings of a recipe and exit, if they stand in a module of their own.

    They are then read without PyTorch. Other recipes have to be imported as a whole.
    """
    if not (_folder() / name / "presets.py").exists():
        return
    presets = import_module(f"sslkit.recipes.{name}.presets").PRESETS
    words = [word for word in arguments if word not in ("-h", "--help")]
    asked, _ = tyro.cli(_Asked, args=words, return_unknown_args=True)
    if asked.preset not in presets:
        refuse("preset", asked.preset, list(presets), f"sslkit run {name} --help")
    default = presets[asked.preset]
    tyro.cli(type(default), default=default, args=arguments, prog=f"sslkit run {name}")


def recipes() -> dict[str, Path]:
    """The files of the recipes, by name: ``recipes/NAME.py`` or ``recipes/NAME/recipe.py``."""
    folder = _folder()
    found = {path.stem: path for path in folder.glob("*.py") if path.stem != "__init__"}
    found |= {path.parent.name: path for path in folder.glob("*/recipe.py")}
    return dict(sorted(found.items()))


def module_of(path: Path) -> str:
    """The name by which Python imports the file of a recipe."""
    parts = path.relative_to(_folder()).with_suffix("").parts
    return ".".join(("sslkit", "recipes", *parts))


def _folder() -> Path:
    return Path(str(files("sslkit"))) / "recipes"
