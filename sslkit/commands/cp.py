"""`sslkit cp RECIPE FILE.py`: copy the file of a recipe, to change it."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sslkit.command_line import refuse
from sslkit.commands.run import recipes


@dataclass(frozen=True)
class Settings:
    """Copy the file of a recipe, to change it.

    The copy is a program of its own: run it with Python.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of the recipe; `sslkit run` lists them."""
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py")]
    """File to write, or a folder to write it into under the recipe's own name."""
    force: bool = False
    """Replace a file that is there already."""


def main(arguments: Sequence[str]) -> None:
    """Copy, and say how to run the copy."""
    settings = tyro.cli(Settings, args=arguments, prog="sslkit cp")
    found = recipes()
    if settings.recipe not in found:
        refuse("recipe", settings.recipe, list(found), "sslkit run --help")
    target = settings.file
    if target.is_dir():
        target = target / f"{settings.recipe}_recipe.py"
    try:
        with target.open("w" if settings.force else "x") as file:
            file.write(found[settings.recipe].read_text())
    except FileExistsError:
        sys.exit(f"error: {target} is there already: choose another name, or give --force")
    print(f"{target}: run it with\n  python {shlex.quote(str(target))} --preset demo")
