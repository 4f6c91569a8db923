"""`sslkit shards FOLDER OUTPUT`: make tar shards from a folder of images."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from sslkit.progress import WorkProgress


@dataclass(frozen=True)
class Settings:
    """Make tar shards from a folder of images."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of images, with or without class folders."""
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder for the shards."""
    images_per_shard: int = 10_000
    """Number of images of a shard."""
    split: str = "train"
    """Start of the shards' names."""
    seed: int = 0
    """Seed of the shuffle."""
    workers: int = 4
    """Threads that read images."""


def main(arguments: Sequence[str]) -> None:
    """Make shards, and name the images that are not in them."""
    settings = tyro.cli(Settings, args=arguments, prog="sslkit shards")
    from sslkit.data.shards.writer import make_shards

    with WorkProgress("images") as progress:
        report = make_shards(**asdict(settings), progress=progress.reach)
    print(f"{report.num_images} images in {len(report.shards)} shard(s) in {settings.output}")
    for each in report.unreadable[:10]:
        print(f"left out: {each}", file=sys.stderr)
    if report.unreadable:
        print(f"{len(report.unreadable)} unreadable image(s) left out", file=sys.stderr)
