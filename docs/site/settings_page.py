"""The page "Every setting", made from the recipe's dataclasses whenever the site is built."""

import dataclasses
import inspect
from typing import Any

from sslkit.recipes.franca.presets import PRESETS
from sslkit.training.help_text import documentation

PAGE = "settings.md"
INTRODUCTION = """# Every setting

The settings of the recipe of Franca, made from its dataclasses when this site is built. A setting's
flag is its name with dashes: `--model.num-prototypes 4096`. The column *default* is `vitb14_in21k`,
the paper's ViT-B on ImageNet-21K; behind it stand the presets that differ. `--help-all` prints the
values of the preset that is asked for. Shares are of the number of steps, so that a shorter run
keeps the shape of its schedules.
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the page to the site (a hook of mkdocs)."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=markdown()))
    return files


def markdown() -> str:
    """The page: a table for each section of the settings."""
    presets = {name: preset for name, preset in PRESETS.items() if name != "vitb14_in21k"}
    default = PRESETS["vitb14_in21k"]
    sections = [("", default)] + [
        (field.name, getattr(default, field.name))
        for field in dataclasses.fields(default)
        if dataclasses.is_dataclass(getattr(default, field.name))
    ]
    lines = [INTRODUCTION]
    for section, values in sections:
        kind = type(values)
        described = documentation(kind)
        lines += [f"## {kind.__name__}", "", inspect.getdoc(kind) or "", ""]
        lines += ["| flag | default | other presets | what it is |", "| --- | --- | --- | --- |"]
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if dataclasses.is_dataclass(value):
                continue
            others = {
                name: getattr(getattr(preset, section) if section else preset, field.name)
                for name, preset in presets.items()
            }
            flag = f"--{section}{'.' * bool(section)}{field.name}".replace("_", "-")
            cells = (f"`{flag}`", _code(value), _differing(value, others))
            text = described.get(field.name, "").replace("|", "\\|")
            lines.append(f"| {' | '.join(cells)} | {text} |")
        lines.append("")
    return "\n".join(lines)


def _differing(value: Any, others: dict[str, Any]) -> str:
    by_value: dict[str, list[str]] = {}
    for name, other in others.items():
        if other != value and name != other:  # not --preset itself
            by_value.setdefault(_code(other), []).append(name)
    return "; ".join(f"{code} {', '.join(names)}" for code, names in by_value.items())


def _code(value: Any) -> str:
    if isinstance(value, tuple):
        return f"`{' '.join(_plain(item) for item in value)}`" if value else "none"
    return f"`{_plain(value)}`" if value != "" else "none"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
