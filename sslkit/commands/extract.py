"""`sslkit extract`: features of images, as a NumPy array or a Parquet file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Features of images, one row an image, as a NumPy array or a Parquet file."""

    weights: str
    """Model: a file, a folder, hf:ORG/NAME, timm:NAME, sslkit:NAME or random:NAME."""
    data: str
    """Images: a folder, shards, an array file, ... (sslkit.data.sources.open_source)."""
    output: Path
    """FILE.npy (with FILE.csv, names and labels, and FILE.json beside it) or FILE.parquet. An
    interrupted run continues where it was."""
    split: Literal["train", "test"] = "train"
    """Split of data that have splits of their own; other data are taken whole."""
    token: Literal["cls", "mean_patch", "cls_and_mean_patch", "layer_cls"] = "cls"
    """Features: the class token, the mean of the patch tokens, both, or the class tokens of the
    last --num-layers blocks."""
    num_layers: int = 4
    """Blocks of --token layer_cls."""
    rasa: Path | None = None
    """Projector that removes position from the final tokens; not for --token layer_cls."""
    nesting: tuple[int, ...] = ()
    """Numbers of first features to keep; several sizes give several arrays."""
    view: Literal["crop", "padded"] = "crop"
    """crop: the image is resized and its centre cut out. padded: the whole image in its own size,
    padded to whole patches."""
    image_size: tuple[int, ...] = ()
    """Size of the crop: pixels a side, or height and width; default: the model's own."""
    resize_over_crop: float = 256 / 224
    """Shorter side of the image before the crop, over that of the crop."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored features."""
    batch_size: int = 64
    """Images of a forward pass."""
    part_size: int = 1024
    """Images that a killed process loses at most."""
    cache: Path | None = None
    """Folder in which the tokens of the model stay, for other outputs of the same images: another
    --rasa, --nesting, --dtype or format computes nothing again."""
    seed: int = 0
    """Seed of random: weights."""
    processes: int = 1
    """Processes on this machine, each with its share of the images. Or start the command with
    torchrun, on one machine or several that see the same output folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model."""
    workers: int = 0
    """Processes that read images, for each process that encodes them."""


def main(arguments: Sequence[str]) -> None:
    """Extract, and say which arrays were written and which images are not in them."""
    settings = tyro.cli(Settings, args=arguments, prog="sslkit extract")
    from sslkit.extract import Extraction
    from sslkit.extract.processes import extract_with_processes

    given = asdict(settings)
    output, processes, device, workers = (
        given.pop(name) for name in ("output", "processes", "device", "workers")
    )
    description = extract_with_processes(
        Extraction(**given), output, processes=processes, device=device, num_workers=workers
    )
    if description is None:
        return
    for name, shape in description["shape"].items():
        column = output.suffix == ".parquet"
        where = f"{output}: {name}" if column else f"{output.parent / name}:"
        print(f"{where} {description['dtype']} {shape}")
    unreadable = description["unreadable"]
    if unreadable:
        print(f"{len(unreadable)} images could not be read and have no row; the first:")
        print("\n".join(f"  {reason}" for reason in unreadable[:5]))
