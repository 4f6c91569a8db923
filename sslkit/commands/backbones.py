"""``python -m sslkit.backbones FILE``: what is in a file of weights, and how it is read."""

import argparse
import sys
from collections.abc import Sequence

from sslkit.backbones.read import read
from sslkit.command_line import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of one file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sslkit.backbones", description=__doc__)
    parser.add_argument("weights", help="a file, a folder, hf:ORG/NAME or timm:NAME")
    parser.add_argument("--img-size", type=int, nargs="+", help="one number, or height and width")
    parser.add_argument("--in-chans", type=int, help="channels of the images")
    parser.add_argument("--which", help="of several networks in a file: student, ...")
    parser.add_argument("--num-heads", type=int, help="attention heads, where no file says them")
    parser.add_argument("--architecture", help="a name of timm, where no file says it")
    parser.add_argument(
        "--ignore", nargs="*", default=(), help="patterns of names that need not match"
    )
    options = vars(parser.parse_args(arguments))
    size = options.pop("img_size")
    try:
        img_size = size[0] if size and len(size) == 1 else size
        loaded = read(options.pop("weights"), img_size=img_size, **options)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(loaded.report)
    return 0


if __name__ == "__main__":
    run_command(main)
