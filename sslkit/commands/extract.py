"""python -m sslkit.extract --weights W --data D --output features.npy: features of images."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sslkit.command_line import run_command
from sslkit.extract.parts import Extraction
from sslkit.extract.processes import extract_with_processes


@dataclass(frozen=True)
class Settings:
    """Features of images, one row an image, as a NumPy array or a Parquet file."""

    extraction: Annotated[Extraction, tyro.conf.arg(name="")]
    output: Path
    """FILE.npy (with FILE.csv, names and labels, and FILE.json beside it) or FILE.parquet. An
    interrupted run continues where it was."""
    processes: int = 1
    """Processes on this machine, each with its share of the images. Or start the command by
    torchrun, on one machine or several that see the same output folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 0
    """Processes that read images, for each process that encodes them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    try:
        settings = tyro.cli(
            Settings,
            args=list(sys.argv[1:] if arguments is None else arguments),
            prog="python -m sslkit.extract",
        )
        description = extract_with_processes(
            settings.extraction,
            settings.output,
            processes=settings.processes,
            device=settings.device,
            num_workers=settings.workers,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if description is None:
        return
    for name, shape in description["shape"].items():
        column = settings.output.suffix == ".parquet"
        where = f"{settings.output}: {name}" if column else f"{settings.output.parent / name}:"
        print(f"{where} {description['dtype']} {shape}")
    unreadable = description["unreadable"]
    if unreadable:
        print(f"{len(unreadable)} images could not be read and have no row; the first:")
        print("\n".join(f"  {reason}" for reason in unreadable[:5]))


if __name__ == "__main__":
    run_command(main)
