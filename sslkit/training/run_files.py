"""The small files that describe a run in its folder: settings.json and data.json."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sslkit.files import atomic_write
from sslkit.training.run import has_begun
from sslkit.training.settings import RunSettings, SettingsError, as_json, from_json

S = TypeVar("S", bound=RunSettings)


def write_file(output: Path, name: str, text: str) -> None:
    """Write a small file into the folder of a run.

    Raises:
        SettingsError: it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / name) as file:
            file.write(text.encode())
    except OSError as error:
        raise SettingsError(f"--output {output} cannot be written: {error}") from error


def read_settings(output: Path, default: S) -> S | None:
    """The settings that a run in ``output`` was started with; None if there is no run.

    Args:
        output: folder of the run.
        default: any settings of the recipe, from which settings are taken that the file lacks.

    Raises:
        SettingsError: the file cannot be read, or is of another recipe.
    """
    path = output / "settings.json"
    try:
        stored = from_json(path.read_text(), default) if path.exists() else None
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path} cannot be read ({error}): it is damaged, or another version of this recipe "
            "wrote it. Restore it, or choose another --output"
        ) from error
    return None if stored is None else replace(stored, output=output)  # it may have been moved


def write_settings(settings: RunSettings, stage_names: Sequence[str]) -> None:
    """Write ``settings.json``, with all stages that the run was ever asked for.

    Args:
        settings: of this call.
        stage_names: all stages of the recipe, in order.
    """
    stored = read_settings(settings.output, settings)
    begun = any(has_begun(settings.output, name) for name in stage_names)
    if stored is not None and (settings.resume or begun):
        asked = {*stored.stages, *settings.stages}
        stages = tuple(name for name in stage_names if name in asked)
        settings = replace(settings, stages=stages)
    write_file(settings.output, "settings.json", as_json(settings))
