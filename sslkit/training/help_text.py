"""Help on a recipe's settings in two layers: ``--help`` has the common ones, ``--help-all`` all."""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from typing import Annotated, Any, NoReturn, get_type_hints

import tyro

SHORT, ALL = ("-h", "--help"), "--help-all"

COMMON = {
    "preset": "--preset cifar10",
    "data": "--data ~/pictures",
    "output": "--output runs/pictures",
    "stages": "--stages pretrain evaluate",
    "steps": "--steps 20000",
    "batch_size": "--batch-size 128",
    "init_from": "--init-from hf:facebook/dinov2-small",
    "model.backbone": "--model.backbone vit_small_patch16_224",
    "crops.global_size": "--crops.global-size 112",
    "resume": "--resume",
}
"""The settings that most people change, with an example of each. A recipe may lack some."""


def without_help(words: Sequence[str]) -> list[str]:
    """The words of a command line that do not ask for help."""
    return [word for word in words if word not in (*SHORT, ALL)]


def show_settings(default: Any, words: Sequence[str], *, program: str | None = None) -> NoReturn:
    """Print the settings of a recipe and exit.

    Args:
        default: settings of the recipe, a dataclass, with the values to show.
        words: the command line. All settings are printed if ``--help-all`` is one of its words, the
            common ones otherwise.
        program: command that runs the recipe, as it is typed; by default the script itself.
    """
    shown, more = default, ""
    if ALL not in words:
        shown = _common(default)
        more = f"\n--help-all shows all {_count(default)} settings."
    description = (inspect.getdoc(type(default)) or "").strip() + more
    tyro.cli(type(shown), default=shown, args=["--help"], prog=program, description=description)
    raise AssertionError("tyro exits after a help text")


def documentation(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of its bases, each in one line."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(), ast.Expr(ast.Constant(str() as text)):
                    found[ast.unparse(field.target)] = " ".join(text.split())
    return found


def _common(default: Any) -> Any:
    """A flat dataclass of the common settings, with their values."""
    columns = []
    for path, example in COMMON.items():
        owner, _, name = path.rpartition(".")
        section = getattr(default, owner, None) if owner else default
        if section is not None and hasattr(section, name):
            kind = type(section)
            text = f"{documentation(kind).get(name, '')} Example: {example}"
            flag = tyro.conf.arg(name=path, help=text)
            annotated: Any = Annotated[get_type_hints(kind)[name], flag]
            columns.append((path.replace(".", "_"), annotated, getattr(section, name)))
    return make_dataclass("Settings", columns)()


def _count(settings: Any) -> int:
    """Number of settings, those of sections included."""
    values = [getattr(settings, field.name) for field in fields(settings)]
    return sum(_count(x) if is_dataclass(x) else 1 for x in values)
