"""Weights that come with sslkit: ``sslkit:NAME``.

Each is a folder ``sslkit/weights/NAME`` with ``model.safetensors``, a file of
`sslkit.backbones.save` with heads, and its model card, ``README.md``. They are data of the package,
so that a wheel, an editable install and a clone all have them without a network.
``benchmarks/release_weights.py`` makes them.
"""

import difflib
from pathlib import Path

PREFIX = "sslkit:"
FOLDER = Path(__file__).parent.parent / "weights"
WEIGHTS, CARD = "model.safetensors", "README.md"


def packaged_names() -> list[str]:
    """Names of the weights that come with this installation, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{WEIGHTS}"))


def packaged_file(name: str) -> Path:
    """The file of ``sslkit:NAME``.

    Raises:
        FileNotFoundError: there are no such weights; the message lists those that there are.
    """
    known, rest = packaged_names(), name.removeprefix(PREFIX)
    if rest in known:
        return FOLDER / rest / WEIGHTS
    if not known:
        raise FileNotFoundError(f"no weights {name!r}: this version of sslkit comes without any")
    close = difflib.get_close_matches(rest, known, n=1)
    meant = f"did you mean {PREFIX}{close[0]}? " if close else ""
    listed = ", ".join(PREFIX + each for each in known)
    raise FileNotFoundError(f"no weights {name!r}: {meant}sslkit comes with {listed}")
