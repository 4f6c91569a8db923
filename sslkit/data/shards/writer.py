"""Tar shards from a folder of images."""

import contextlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslkit.data.decode import MAX_BYTES, UnreadableImage, decode_image, unreadable_as
from sslkit.data.image_folder import ImageFolder
from sslkit.data.regular_file import read_regular
from sslkit.data.seeds import sample_seed
from sslkit.data.shards.index import INDEX_NAME, read_index
from sslkit.data.splits import own_test_split

_PROBE_SIDE = 256  # every byte of an image is decoded as a check, JPEGs to a small size


@dataclass(frozen=True)
class ShardReport:
    """What :func:`make_shards` made: the shards, how many images, and the images left out."""

    shards: tuple[Path, ...]
    num_images: int
    unreadable: tuple[UnreadableImage, ...]


def make_shards(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    images_per_shard: int = 10_000,
    split: str = "train",
    seed: int = 0,
    workers: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> ShardReport:
    """Write the images of ``folder`` into ``output/train-000000.tar``, ``train-000001.tar``, ...

    The images (those of :class:`~sslkit.data.image_folder.ImageFolder`) are shuffled, and their
    bytes copied unchanged, as ``000000123.jpg`` with the class in ``000000123.cls`` where the
    folder has classes. Images that cannot be decoded are left out. ``output/shards.json`` gets the
    number of images of each shard and the class names; when it exists already, from another split,
    it is added to, and its class names number the classes of this one.

    The shards appear in ``output`` when all of them are complete. After an error (a full disk
    too), none is there.

    Args:
        folder: the images of one split.
        output: made if it does not exist.
        images_per_shard: the last shard may hold fewer.
        split: the start of the shards' names.
        seed: of the shuffle.
        workers: threads that read and check images.
        progress: called with (images done, images in all), from this thread.

    Raises:
        FileExistsError: ``output`` holds shards of this split; nothing is overwritten.
        FileNotFoundError: there is no image in ``folder``.
        ValueError: a folder of splits, unknown classes, or no image that can be read.
    """
    folder, output = Path(folder), Path(output)
    if images_per_shard < 1 or workers < 1:
        raise ValueError(
            f"images_per_shard and workers must be at least 1, got {images_per_shard} and {workers}"
        )
    if not split or set(split) & set("/\\{}*?[]:."):
        raise ValueError(f"split must be a word that can start a file name, got {split!r}")
    _refuse_folder_of_splits(folder)
    found = sorted(output.glob(f"{split}-*.tar"))
    if found:
        raise FileExistsError(
            f"{os.fspath(output)!r} holds shards of the split {split!r}, such as {found[0].name}; "
            f"remove them or choose another output or split"
        )
    index = read_index(str(output / INDEX_NAME)) or {"wids_version": 1, "shardlist": []}
    known = index.get("class_names")
    source = ImageFolder(folder, class_names=None if known is None else tuple(known))
    if index["shardlist"] and source.class_names is not None and known is None:
        raise ValueError(f"{folder} has classes, and the shards in {output} have none")
    made_here = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output, prefix=f".{split}-"))
    moved: list[Path] = []
    try:
        writer = _Writer(temporary, split, images_per_shard)
        unreadable = []
        order = _shuffled(len(source), seed)
        for done, (name, result, label) in enumerate(_contents(source, order, workers), 1):
            if isinstance(result, UnreadableImage):
                unreadable.append(result)
            else:
                writer.add(result, Path(name).suffix.lower(), label)
            if progress is not None:
                progress(done, len(source))
        entries = writer.finish()
        if not entries:
            raise ValueError(f"none of the {len(source)} images can be read; {unreadable[0]}")
        for entry in entries:
            moved.append(output / entry["url"])
            os.rename(temporary / entry["url"], moved[-1])
        index["shardlist"] = [*index["shardlist"], *entries]
        index["class_names"] = source.class_names if known is None else known
        index["num_classes"] = len(index["class_names"] or ())
        draft = temporary / INDEX_NAME
        draft.write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(draft, output / INDEX_NAME)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        if made_here:
            with contextlib.suppress(OSError):  # somebody else has put something there
                output.rmdir()
        raise
    shutil.rmtree(temporary)
    return ShardReport(tuple(moved), sum(each["nsamples"] for each in entries), tuple(unreadable))


class _Writer:
    """Numbered samples into numbered tar files."""

    def __init__(self, folder: Path, split: str, images_per_shard: int):
        self.folder = folder
        self.split = split
        self.images_per_shard = images_per_shard
        self.entries: list[dict[str, Any]] = []
        self._tar: tarfile.TarFile | None = None
        self._key = 0

    def add(self, content: bytes, extension: str, label: int) -> None:
        if self._tar is None:
            name = f"{self.split}-{len(self.entries):06d}.tar"
            self.entries.append({"url": name, "nsamples": 0})
            path = self.folder / name
            self._tar = tarfile.open(path, "x", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        if label >= 0:
            self._write(f"{self._key:09d}.cls", str(label).encode())
        self._write(f"{self._key:09d}{extension}", content)
        self._key += 1
        self.entries[-1]["nsamples"] += 1
        if self.entries[-1]["nsamples"] == self.images_per_shard:
            self._close()

    def finish(self) -> list[dict[str, Any]]:
        self._close()
        return self.entries

    def _write(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)  # time and owner stay zero: the same input, the same bytes
        info.size = len(content)
        assert self._tar is not None
        self._tar.addfile(info, io.BytesIO(content))

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            entry = self.entries[-1]
            entry["filesize"] = (self.folder / entry["url"]).stat().st_size


def _contents(
    source: ImageFolder, order: list[int], workers: int
) -> Iterator[tuple[str, bytes | UnreadableImage, int]]:
    """File name, bytes and label in ``order``, read ahead by a few images a worker."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[int, Future[bytes | UnreadableImage]]] = deque()
        try:
            for i in order:
                ahead.append((i, pool.submit(_read, source.name(i))))
                if len(ahead) > 4 * workers:
                    done, future = ahead.popleft()
                    yield source.name(done), future.result(), source.label(done)
            for done, future in ahead:
                yield source.name(done), future.result(), source.label(done)
        finally:
            pool.shutdown(cancel_futures=True)


def _read(path: str) -> bytes | UnreadableImage:
    try:
        with unreadable_as(path):
            content = read_regular(path, max_bytes=MAX_BYTES)
            decode_image(content, name=path, max_side=_PROBE_SIDE)
    except UnreadableImage as error:
        return error
    return content


def _shuffled(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(sample_seed(seed, count))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _refuse_folder_of_splits(folder: Path) -> None:
    children = {child.name for child in folder.iterdir() if child.is_dir()}
    test = own_test_split(children)
    if test is not None:
        raise ValueError(
            f"{os.fspath(folder)!r} is a folder of splits; make the shards of each with its own "
            f"--split: of {folder / 'train'} with 'train', then of {folder / test} with {test!r}"
        )
