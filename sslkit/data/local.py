"""Names of data that stand for files of this machine."""

import os
from pathlib import Path

from sslkit.data.shards.urls import expand_shards, is_remote
from sslkit.data.torchvision_images import torchvision_names


def is_local(spec: str | os.PathLike[str]) -> bool:
    """Whether :func:`sslkit.data.open_source` reads only local files for ``spec``.

    The answer is False for anything that starts a program (``pipe:``) or asks another machine
    (URLs, ``hf:``, ``hf-stream:``), alone or among several shards. Torchvision's data sets count as
    local although torchvision downloads them, because the addresses are its own.

    Raises:
        ImportError, ValueError: shards that :func:`sslkit.data.shards.urls.expand_shards` refuses.

    >>> is_local("scenes"), is_local("CIFAR10"), is_local("/data/train-{000..123}.tar")
    (True, True, True)
    >>> is_local("hf:mnist"), is_local("s3://bucket/a.tar"), is_local("a.tar::pipe:cat b.tar")
    (False, False, False)
    """
    text = os.fspath(spec)
    if text == "scenes" or text in torchvision_names():
        return True
    if text.startswith(("hf:", "hf-stream:", "pipe:")):
        return False
    if os.path.exists(os.path.expanduser(text)):
        return True
    return not any(is_remote(url) for url in expand_shards(text))


def resolved(spec: str) -> str:
    """The whole path of a file or a folder that is there; any other name as it is."""
    path = Path(spec)
    return str(path.resolve()) if path.exists() else spec
