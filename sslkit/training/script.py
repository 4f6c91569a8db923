"""A recipe's file as a program: what it calls first and last, and its settings without its imports.

The file has this form. Nothing above `begin` needs PyTorch::

    PRESETS = {"demo": Settings(preset="demo", ...)}

    if __name__ == "__main__":
        begin(PRESETS, __file__)

    import torch
    ...
    RECIPE = Recipe(PRESETS, ...)

    if __name__ == "__main__":
        run_recipe(RECIPE)
"""

import ast
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import tyro

from sslkit.command_line import refuse, run_command
from sslkit.training.help_text import show_settings, without_help
from sslkit.training.settings import DEFAULT_PRESET

if TYPE_CHECKING:
    from sslkit.training.command import Recipe

_BEGIN = "if __name__ == '__main__':\n    begin(PRESETS, __file__)"
_RUN = "if __name__ == '__main__':\n    run_recipe(RECIPE)"


def begin(presets: Mapping[Any, Any], file: str) -> None:
    """Answer ``--help`` and ``--help-all`` before the script imports what takes seconds.

    If the command line asks for help, print the settings of its preset and exit. This is left to
    `run_recipe`, after the imports, if the script may change the settings below this call: if it
    does more with ``PRESETS`` and ``RECIPE`` than the module's example.

    An interrupt (Ctrl-C) of the imports then ends the program without a traceback.

    Args:
        presets: settings by name, the value of ``PRESETS``.
        file: path of the script.
    """
    words = sys.argv[1:]
    if without_help(words) != words and _above_begin(Path(file)) is not None:
        show_help(presets, words)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_recipe(recipe: "Recipe[Any]") -> NoReturn:
    """Run a recipe with the command line of this process, and exit."""
    from sslkit.training.command import main

    run_command(partial(main, recipe))


def presets_of(file: Path) -> Mapping[Any, Any] | None:
    """``PRESETS`` of a script, of which only what is above `begin` is executed.

    None if the script may change the settings below, as in :func:`begin`.
    """
    above = _above_begin(file)
    if above is None:
        return None
    module = ModuleType(f"settings_of_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # annotations and comments of its classes are found there
    exec(compile(above, file, "exec"), module.__dict__)
    return module.PRESETS


@dataclass(frozen=True)
class _Asked:
    """The preset whose values a help text shows."""

    preset: str = DEFAULT_PRESET


def show_help(
    presets: Mapping[Any, Any], words: Sequence[str], *, program: str | None = None
) -> NoReturn:
    """Print the settings of the preset that a command line names, and exit.

    Args:
        presets: settings by name.
        words: the command line, with ``--help``, ``-h`` or ``--help-all``.
        program: command that runs the recipe, as it is typed; by default the script itself.
    """
    asked, _ = tyro.cli(_Asked, args=without_help(words), return_unknown_args=True)
    if asked.preset not in presets:
        program = program or Path(sys.argv[0]).name
        refuse("preset", asked.preset, list(presets), f"{program} --help")
    show_settings(presets[asked.preset], words, program=program)


def _above_begin(file: Path) -> ast.Module | None:
    """What decides the settings of a script: the statements above `begin`.

    None if those below do more with ``PRESETS`` than to pass it to the call that makes ``RECIPE``,
    or more with ``RECIPE`` than to run it.
    """
    body = ast.parse(file.read_text()).body
    texts = [ast.unparse(statement) for statement in body]
    if texts.count(_BEGIN) != 1:
        return None
    start = texts.index(_BEGIN)
    later = range(start + 1, len(body))
    about = [i for i in later if re.search(r"\b(PRESETS|RECIPE)\b", texts[i])]
    if [texts[i] for i in about[1:]] != [_RUN]:
        return None
    made = body[about[0]]
    if not (isinstance(made, ast.Assign) and isinstance(made.value, ast.Call)):
        return None
    given = [*made.value.args, *(keyword.value for keyword in made.value.keywords)]
    if [text for text in map(ast.unparse, given) if "PRESETS" in text] != ["PRESETS"]:
        return None
    return ast.Module(body[:start], type_ignores=[])
