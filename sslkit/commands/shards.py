"""``python -m sslkit.data.shards FOLDER OUTPUT``: tar shards from a folder of images."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from sslkit.command_line import run_command
from sslkit.data.shards.writer import make_shards


def main(arguments: Sequence[str] | None = None) -> int:
    """Make shards as the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sslkit.data.shards", description=__doc__)
    parser.add_argument("folder", help="images, with or without class folders")
    parser.add_argument("output", help="the folder for the shards")
    parser.add_argument("--images-per-shard", type=int, default=10_000, metavar="N")
    parser.add_argument("--split", default="train", help="the start of the shards' names")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument("--workers", type=int, default=4, help="threads that read images")
    options = parser.parse_args(arguments)
    try:
        with _progress_bar() as progress:
            report = make_shards(**vars(options), progress=progress)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{report.num_images} images in {len(report.shards)} shard(s) in {options.output}")
    for each in report.unreadable[:10]:
        print(f"left out: {each}", file=sys.stderr)
    if report.unreadable:
        print(f"{len(report.unreadable)} unreadable image(s) left out", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    try:
        from rich.progress import Progress
    except ImportError:
        print("no progress bar: rich is not installed", file=sys.stderr)
        yield None
        return
    with Progress() as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    run_command(main)
