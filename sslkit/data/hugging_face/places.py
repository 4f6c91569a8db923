"""Which files and addresses the cells of a table may name.

A table, such as a Parquet file, may come from anybody, and a cell may hold the path or the URL of
an image instead of its bytes. `sslkit.data.open_source` reads only paths below the folder of the
data, and what ``datasets`` itself has unpacked or downloaded for it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_ARCHIVES = ("zip", "tar", "gzip", "bz2", "lzma", "zstd", "lz4")


@dataclass(frozen=True)
class Places:
    """Folders and addresses; `local` and `remote` say whether something lies below one.

    Attributes:
        folders: absolute paths. A relative path is relative to the first one.
        addresses: what a URL must start with.
    """

    folders: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    def local(self, path: str) -> str:
        """The absolute path.

        Raises:
            ValueError: it leads out of all folders.

        >>> Places(("/data",)).local("cats/1.jpg")
        '/data/cats/1.jpg'
        >>> Places(("/data",)).local("/data/../etc/passwd")
        Traceback (most recent call last):
        ...
        ValueError: it names the file /data/../etc/passwd outside of the folder of the data...
        """
        absolute = os.path.normpath(os.path.join(*self.folders[:1], path))
        if not any(absolute.startswith(os.path.join(folder, "")) for folder in self.folders):
            raise ValueError(f"it names the file {path} outside of the folder of the data{_REMEDY}")
        return absolute

    def remote(self, url: str) -> str:
        """The URL, which may be of a member of an archive: ``zip://1.png::/data/images.zip``.

        Raises:
            ValueError: it leads elsewhere.
        """
        *members, archive = url.split("::")
        if all(member.partition("://")[0] in _ARCHIVES for member in members):
            if "://" not in archive and members:
                return "::".join([*members, self.local(archive)])
            if archive.startswith(self.addresses) and ".." not in archive.split("/"):
                return url
        raise ValueError(f"it names the address {url}, which is not one of the data's own{_REMEDY}")


def places_of(name: str) -> Places:
    """The places of a data set that a user has named.

    Args:
        name: a local folder or file, a pattern or URL of files, or a data set of the Hub.
    """
    from datasets import config

    path = Path(name).expanduser()
    unpacked = os.path.abspath(config.EXTRACTED_DATASETS_PATH)
    if path.is_dir():
        return Places((os.path.abspath(path), unpacked))
    if name.lower().endswith(".parquet"):
        return Places(() if "://" in name else (os.path.abspath(path.parent),))
    from huggingface_hub import constants

    stored = (config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    own = (f"hf://datasets/{name}@", f"hf://datasets/{name}/")
    return Places(
        (unpacked, *map(os.path.abspath, stored)), (*own, f"{config.HF_ENDPOINT}/datasets/{name}/")
    )


def check_card(folder: str | os.PathLike[str]) -> None:
    """Raise a ValueError if the card of a local data set names files outside of its folder.

    ``datasets`` opens the paths and URLs that ``README.md`` and ``.huggingface.yaml`` have under
    ``configs``, as ``data_files`` and ``data_dir``.
    """
    from datasets import config
    from huggingface_hub import DatasetCard
    from yaml import safe_load

    card = Path(folder, config.REPOCARD_FILENAME)
    other = Path(folder, config.REPOYAML_FILENAME)
    stated = []
    if card.is_file():
        stated.append(DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict())
    if other.is_file():
        stated.append(safe_load(other.read_text(encoding="utf-8")))
    for each in stated:
        configs = each.get("configs") if isinstance(each, dict) else None
        for one in configs if isinstance(configs, list) else ():
            for key in ("data_files", "data_dir"):
                for text in _texts(one.get(key) if isinstance(one, dict) else None):
                    if (
                        "://" in text
                        or "::" in text
                        or os.path.isabs(text)
                        or ".." in Path(text).parts
                    ):
                        raise ValueError(
                            f"the card of {os.fspath(folder)} names {text!r} under {key}, which is "
                            "not in that folder; give that data itself, if you trust it"
                        )


def _texts(value: object) -> list[str]:
    """All texts in nested lists and objects, keys left out."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _texts(each)]


_REMEDY = (
    ". Tables may hold images as bytes; in Python, HuggingFaceImages(dataset) follows any path and "
    "URL of a table that you trust"
)
