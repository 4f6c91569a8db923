"""`sslkit backbones WEIGHTS`: show what is in a file of weights, and how it is read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Settings:
    """Show what is in a file of weights, and how it is read."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """A file, a folder, hf:ORG/NAME, timm:NAME, sslkit:NAME or random:NAME."""
    img_size: tuple[int, ...] = ()
    """Resample the positions for images of this size: pixels a side, or height and width."""
    in_chans: int | None = None
    """Channels of the images."""
    which: str | None = None
    """One of several networks in the file: student, teacher, ..."""
    num_heads: int | None = None
    """Attention heads, where the file does not say them."""
    architecture: str | None = None
    """Name of timm's architecture, where the file does not say it."""
    ignore: tuple[str, ...] = ()
    """Patterns of names of tensors that need not match."""


def main(arguments: Sequence[str]) -> None:
    """Read the weights and print the report."""
    options = asdict(tyro.cli(Settings, args=arguments, prog="sslkit backbones"))
    from sslkit.backbones import load_pretrained

    size = options.pop("img_size")
    img_size = size[0] if len(size) == 1 else size or None
    print(load_pretrained(options.pop("weights"), img_size=img_size, **options).report)
