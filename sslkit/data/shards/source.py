"""Images in webdataset tar shards, read at random."""

import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from itertools import chain
from typing import IO, Any

import numpy as np
from torch import Tensor

from sslkit.data.decode import MAX_SIDE, UnreadableImage, decode_image
from sslkit.data.fingerprint import digest
from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.labels import NO_LABEL, check_num_classes, count_classes, label_rule
from sslkit.data.regular_file import open_regular
from sslkit.data.shards.cache import ShardCache
from sslkit.data.shards.index import Contents, read_contents
from sslkit.data.shards.members import BAD_LABEL, Members, read_members
from sslkit.data.shards.order import LaneOrder
from sslkit.data.shards.urls import expand_shards, is_remote
from sslkit.data.splits import choose_test
from sslkit.data.string_table import StringTable

_MAX_OPEN_FILES = 64
_MAX_MEMBER_TABLES = 256
_RETRY_SECONDS = 60


class TarShards:
    """The images of webdataset tar shards, as a source like any other.

    Files of a shard that share their name up to its first dot are one sample: ``000123.jpg`` the
    image, ``000123.cls`` its label as a decimal number, -1 for none; see
    :func:`sslkit.data.shards.members.read_members`. An image whose ``.cls`` is not a label
    (:mod:`sslkit.data.labels`) is unreadable. Nothing is ever unpickled.

    Local shards are read in place. Any other URL that ``webdataset.gopen`` or fsspec can open
    (``pipe:``, ``http:``, ``s3:``, ...) is copied as a whole into a cache folder when an image of
    it is first needed. The number of samples of each shard and the classes stand in an index
    ``shards.json`` beside the shards, which ``sslkit shards`` writes (a
    webdataset index with ``shardlist``, ``url``, ``nsamples`` and ``filesize`` does too). What
    it does not say about a shard, or where its ``filesize`` is not that of a local shard, is read
    from the shard when the source is opened: 0.3 s for 10,000 images in a local file; a remote
    shard must be copied for that. Remote shards are not copied for the number of classes alone:
    without ``num_classes`` in an index or as an argument, they have no labels.

    A damaged shard keeps the samples before the damage; a missing one has none. Damage that is met
    after opening, as in a shard that vanished, costs the samples it hides: each raises
    :class:`~sslkit.data.decode.UnreadableImage`. Either way the shard is warned of once and
    entered in ``damaged``, the reason by shard, in the process that met it.

    Args:
        urls: see :func:`sslkit.data.shards.urls.expand_shards`; the shards count in this order.
        index: path or URL of an index that says what the shards hold, by their file names, in
            place of the ``shards.json`` beside each.
        num_classes: how many classes there are, in place of what index or labels say.
        cache: the folder for copies of remote shards.
        cache_bytes: the size to which it is kept; see :class:`sslkit.data.shards.cache.ShardCache`.
        lanes, window: of :class:`~sslkit.data.shards.order.LaneOrder`, the order of an epoch. A
            multiple of the number of ranks keeps the shards of each rank apart. Windows over all
            lanes hold ``lanes * window`` images, which are mixed.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: there is no shard of that name, or no image in any of them.
    """

    # What a copy or a pickle leaves behind, and each process has of its own.
    _pid: int
    _lock: threading.Lock
    _files: OrderedDict[str, IO[bytes]]
    _tables: OrderedDict[str, Members]
    _failures: dict[str, tuple[float, str]]

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        index: str | os.PathLike[str] | None = None,
        num_classes: int | None = None,
        cache: str | os.PathLike[str] = "~/.cache/sslkit/shards",
        cache_bytes: int = 100 * 2**30,
        lanes: int = 64,
        window: int = 4096,
        max_side: int = MAX_SIDE,
    ):
        self.damaged: dict[str, str] = {}
        self._has_remarked = False
        self.lanes = lanes
        self.window = window
        self.max_side = max_side
        self._cache = ShardCache(cache, max_bytes=cache_bytes)
        self._start_process()
        shards = expand_shards(urls)
        asked = repr(os.fspath(urls)) if isinstance(urls, str | os.PathLike) else "the given list"
        if not shards:
            raise FileNotFoundError(f"no file matches the pattern {asked} of tar shards")
        contents = read_contents(shards, None if index is None else os.fspath(index))
        counts = [self._count(shard, contents) for shard in shards]
        indexed = [shard in contents.sizes for shard in shards]
        sizes = [size for size, _ in counts]
        if not any(sizes):
            reason = next((f"; {url}: {why}" for url, why in self.damaged.items()), "")
            remarks = (text for members in self._tables.values() for text in members.remarks)
            reason += next((f"; {text}" for text in remarks), "")
            raise FileNotFoundError(
                f"no image in the {len(shards)} tar shard(s) of {asked}; looked for members "
                f"ending in {' '.join(IMAGE_EXTENSIONS)}{reason}"
            )
        if num_classes is None:
            num_classes = max(contents.num_classes, *(classes for _, classes in counts))
        self.num_classes = check_num_classes(num_classes, of=asked)
        names = contents.class_names
        self.class_names = names if names is not None and len(names) == num_classes else None
        self._set_shards(shards, sizes, indexed)

    def _count(self, shard: str, contents: Contents) -> tuple[int, int]:
        """The samples in ``shard``, and where no index has them, the classes of their labels."""
        size = contents.sizes.get(shard)
        if size is not None and (contents.has_classes or is_remote(shard)):
            return size, 0
        try:
            members = self._members(shard)
        except OSError as error:
            self._note_damage(shard, error)
            return 0, 0
        classes = 0 if contents.has_classes else count_classes(members.labels)
        return len(members), classes

    def _set_shards(
        self, shards: Sequence[str], sizes: Sequence[int], indexed: Sequence[bool]
    ) -> None:
        self._shards = StringTable(shards)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._indexed = np.array(indexed, dtype=bool)
        self._ends = np.cumsum(self._sizes)

    @property
    def shards(self) -> tuple[str, ...]:
        """All shards, in the order of the indices: also those in which no image was found."""
        return tuple(self._shards[i] for i in range(len(self._shards)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        shard, item = self._locate(index)
        try:
            members = self._members(shard)
            if item >= len(members):
                raise OSError(members.damage or f"it has {len(members)} images, not as indexed")
            content = self._read(shard, int(members.offsets[item]), int(members.sizes[item]))
        except OSError as error:
            self._note_damage(shard, error)
            raise UnreadableImage(f"{shard}:[{item}]", str(error)) from error
        name = f"{shard}:{members.names[item]}"
        label = int(members.labels[item])
        if self.num_classes and (label == BAD_LABEL or label >= self.num_classes):
            found = "in its .cls is not one" if label == BAD_LABEL else f"is {label}"
            raise UnreadableImage(name, f"its label {found}; {label_rule(self.num_classes)}")
        image = decode_image(content, name=name, max_side=self.max_side)
        return image, label if self.num_classes else NO_LABEL

    def name(self, index: int) -> str:
        """Shard and member, ``train-000007.tar:000123.jpg``."""
        shard, item = self._locate(index)
        try:
            return f"{shard}:{self._members(shard).names[item]}"
        except (OSError, IndexError):
            return f"{shard}:[{item}]"

    def key(self, index: int) -> str:
        """The file names of shard and member or, with an index, the position in the shard.

        A shard whose number of samples is in an index need not be read for the key.
        """
        shard, item = self._locate(index)
        name = shard.replace("\\", "/").rpartition("/")[2]
        is_indexed = self._indexed[np.searchsorted(self._ends, index, side="right")]
        if not is_indexed:
            try:
                return f"{name}:{self._members(shard).names[item]}"
            except (OSError, IndexError):
                pass  # what the shard held when it was opened is gone
        return f"{name}:[{item}]"

    def names_digest(self) -> str:
        """A digest of the shards' file names and their numbers of samples."""
        shards = (shard.rpartition("/")[2] for shard in self.shards)
        return digest(chain(shards, [self._sizes.tobytes()]))

    def epoch_order(self, seed: int) -> LaneOrder:
        """The order of one epoch, which reads few shards at a time."""
        return LaneOrder(self._sizes, lanes=self.lanes, window=self.window, seed=seed)

    def epoch_order_within(self, indices: Tensor, seed: int) -> LaneOrder:
        """`epoch_order` of the samples at ascending ``indices``, as positions in ``indices``."""
        shards = np.searchsorted(self._ends, indices.numpy(), side="right")
        sizes = np.bincount(shards, minlength=len(self._sizes))
        return LaneOrder(sizes, lanes=self.lanes, window=self.window, seed=seed)

    def split(self, test_fraction: float, seed: int = 0) -> tuple["TarShards", "TarShards"]:
        """Divide into ``(train, test)`` by whole shards, so that no shard is read for both.

        A hash of a shard's file name decides, as the hash of an image's name does in
        :func:`sslkit.data.splits.train_test_split`; so adding shards moves none into the test.
        """
        names = [shard.replace("\\", "/").rpartition("/")[2] for shard in self.shards]
        is_test = choose_test(names, test_fraction, seed, of="shards")
        train, test = copy(self), copy(self)
        for part, chosen in ((train, ~is_test), (test, is_test)):
            part._set_shards(
                [self._shards[i] for i in chosen.nonzero()[0].tolist()],
                self._sizes[chosen].tolist(),
                self._indexed[chosen].tolist(),
            )
        return train, test

    @property
    def is_remote(self) -> bool:
        """Whether a shard must be copied before its images can be read."""
        return any(is_remote(shard) for shard in self.shards)

    def _locate(self, index: int) -> tuple[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], index - int(self._ends[shard] - self._sizes[shard])

    def _path(self, shard: str) -> str:
        if not is_remote(shard):
            return shard
        failed_at, reason = self._failures.get(shard, (-float("inf"), ""))
        if time.monotonic() < failed_at + _RETRY_SECONDS:
            raise OSError(reason)
        try:
            return self._cache.path(shard)
        except OSError as error:
            self._failures[shard] = time.monotonic(), str(error)
            raise

    def _members(self, shard: str) -> Members:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        members = read_members(self._path(shard))
        if members.damage is not None:
            self._note_damage(shard, members.damage)
        if members.remarks and not self._has_remarked:
            self._has_remarked = True  # once for all shards, which will be of one maker
            text = "; ".join(members.remarks)
            warnings.warn(f"shard {shard}: {text}", RuntimeWarning, stacklevel=2)
        with self._lock:
            self._tables[shard] = members
            while len(self._tables) > _MAX_MEMBER_TABLES:
                self._tables.popitem(last=False)
        return members

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        path = self._path(shard)
        with self._lock:
            if self._pid != os.getpid():  # a forked file handle shares its position with others
                self._files.clear()
                self._pid = os.getpid()
            if path not in self._files:
                self._files[path] = open_regular(path)
            self._files.move_to_end(path)
            file = self._files[path]
            file.seek(offset)
            content = file.read(size)
            while len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        if len(content) < size:
            raise OSError(f"the file ends {size - len(content)} bytes early")
        return content

    def _note_damage(self, shard: str, reason: object) -> None:
        if shard not in self.damaged:
            self.damaged[shard] = str(reason)
            warnings.warn(f"damaged shard {shard}: {reason}", RuntimeWarning, stacklevel=2)

    def _start_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._files = OrderedDict()
        self._tables = OrderedDict()
        self._failures = {}

    def __getstate__(self) -> dict[str, Any]:
        here = ("_pid", "_lock", "_files", "_tables", "_failures")
        state = {name: value for name, value in self.__dict__.items() if name not in here}
        return {**state, "damaged": dict(self.damaged)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_process()
