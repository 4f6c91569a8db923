"""`sslkit run RECIPE`: train a recipe of this package, from images to report."""

from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from sslkit.command_line import refuse
from sslkit.commands.main import summary, table
from sslkit.training.help_text import without_help
from sslkit.training.script import presets_of, show_help

USAGE = """usage: sslkit run RECIPE ...

Train a recipe of this package, from images to report.

{recipes}

sslkit run RECIPE --help shows its common settings, --help-all all of them.
sslkit cp RECIPE FILE.py copies its file."""


def main(arguments: Sequence[str]) -> None:
    """Run a recipe with the settings of the command line."""
    found = recipes()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(recipes=table({name: summary(path) for name, path in found.items()})))
        return
    name, *rest = arguments
    if name not in found:
        refuse("recipe", name, list(found), "sslkit run --help")
    program = f"sslkit run {name}"
    if without_help(rest) != rest:
        presets = presets_of(found[name])
        if presets is not None:
            show_help(presets, rest, program=program)
    from sslkit.training.command import main as run_recipe

    run_recipe(import_module(module_of(found[name])).RECIPE, rest, program=program)


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
