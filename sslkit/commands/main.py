"""The `sslkit` command: finds the subcommand, runs it, and ends with one line where that fails.

A subcommand is a module of this package with a function ``main(arguments)``. Modules import torch
and all that needs it inside their functions, so that ``--help`` answers at once.
"""

import ast
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from sslkit import __version__
from sslkit.command_line import refuse, run_command

# In the order of --help.
COMMANDS = (
    "run",
    "cp",
    "doctor",
    "plan",
    "evaluate",
    "extract",
    "rasa",
    "export",
    "duplicates",
    "shards",
    "throughput",
    "backbones",
    "conform",
)


def main() -> None:
    """Run the words of the command line, and exit."""
    run_command(lambda: run(sys.argv[1:]))


def run(words: Sequence[str]) -> int:
    """Run one subcommand; return the exit status, or exit with one line if it fails.

    Status 1 is a failure, 2 a command line that cannot be understood.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"sslkit {__version__}")
        return 0
    name, *arguments = words
    if name not in COMMANDS:
        refuse("command", name, COMMANDS, "sslkit --help")
    try:
        import_module(f"sslkit.commands.{name}").main(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sslkit"):
            raise
        extra = "testing" if name == "conform" else "recipe"
        sys.exit(
            f"error: sslkit {name} needs {error.name}, which is not installed: "
            f"pip install 'sslkit[{extra}]'"
        )
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if name == "run" or isinstance(error, BrokenPipeError):
            raise  # a recipe knows its users' mistakes: what is left is its programmer's
        sys.exit(f"error: {' '.join(str(error).split())}")
    return 0


def table(summaries: Mapping[str, str]) -> str:
    """Names and what they are, as the lines of a help text."""
    width = max(map(len, summaries))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in summaries.items())


def summary(path: Path) -> str:
    """The first line of a module's docstring, without the command that it begins with.

    The module is read and not imported.
    """
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    text = first.rpartition("`: ")[2]
    return text[:1].upper() + text[1:]


def _help() -> str:
    folder = Path(__file__).parent
    summaries = {name: summary(folder / f"{name}.py") for name in COMMANDS}
    return (
        "usage: sslkit COMMAND ...\n\n"
        "Self-supervised learning: train, evaluate, and use what was trained.\n\n"
        f"{table(summaries)}\n\n"
        "sslkit COMMAND --help says more. Several processes: torchrun ... -m sslkit COMMAND ..."
    )
