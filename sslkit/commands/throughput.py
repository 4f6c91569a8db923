"""`sslkit throughput DATA`: measure how many images a second the loader gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Settings:
    """Measure how many images a second the loader alone gives, on its own views of the data."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Images: a folder, shards, an array file, ... (sslkit.data.sources.open_source)."""
    batch_size: int = 64
    """Images of a batch."""
    workers: int | None = None
    """Processes that read images; default: one for each CPU core."""
    images: int = 1024
    """Number of images to time."""
    global_size: int = 224
    """Pixels a side of the global crops."""
    local_size: int = 98
    """Pixels a side of the local crops."""
    num_local: int = 8
    """Local crops of an image."""
    max_side: int | None = None
    """Largest side of a decoded image; larger ones are decoded smaller."""
    augment_on: str | None = None
    """Device that augments; default: the workers do."""


def main(arguments: Sequence[str]) -> None:
    """Time the loader and print its speed."""
    settings = tyro.cli(Settings, args=arguments, prog="sslkit throughput")
    from sslkit.data.crops import MultiCrop
    from sslkit.data.decode import MAX_SIDE
    from sslkit.data.loader import MultiCropDataset, make_loader
    from sslkit.data.sources import open_source
    from sslkit.data.throughput import available_cores, measure

    max_side = MAX_SIDE if settings.max_side is None else settings.max_side
    workers = available_cores() if settings.workers is None else settings.workers
    crops = MultiCrop(
        global_size=settings.global_size,
        local_size=settings.local_size,
        num_local=settings.num_local,
    )
    loader = make_loader(
        MultiCropDataset(open_source(settings.data, test_fraction=0, max_side=max_side), crops),
        batch_size=settings.batch_size,
        num_workers=workers,
        augment_on=settings.augment_on,
    )
    speed = measure(loader, num_workers=workers, num_images=settings.images)
    busy = speed.read_seconds + speed.augment_seconds
    print(
        f"{speed.images_per_second:.0f} images/s with {workers} workers; a worker takes "
        f"{1e3 * busy:.1f} ms an image: {speed.read_seconds / busy:.0%} reading and decoding, "
        f"{speed.augment_seconds / busy:.0%} augmentation"
    )
