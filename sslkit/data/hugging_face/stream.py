"""A streaming data set as an endless stream that can be entered anywhere."""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sslkit.data.decode import MAX_SIDE, UnreadableImage
from sslkit.data.hugging_face.columns import Columns, cell_key
from sslkit.data.hugging_face.images import RowsInMemory
from sslkit.data.hugging_face.places import Places
from sslkit.data.image_source import MAX_REPLACEMENTS, StreamItem
from sslkit.data.seeds import sample_seed
from sslkit.data.splits import check_test_fraction, name_hash
from sslkit.data.unreadable import TooManyUnreadable

if TYPE_CHECKING:
    from datasets import IterableDataset

_ROWS_AT_A_TIME = 16


class HuggingFaceStream:
    """A ``datasets.IterableDataset`` as an endless stream.

    It is a :class:`~sslkit.data.image_source.StreamSource`.

    The stream has ``S = min(dataset.num_shards, max_lanes)`` lanes. Lane l holds the shards (the
    files) ``l``, ``l + S``, ``l + 2 S``, ... and is read to its end over and over. Pass e of it
    puts its shards in random order and shuffles their samples in a buffer of
    ``max(shuffle // S, 1)``, by a seed that depends on (seed, l, e). Sample p of the stream is
    item ``p // S`` of lane ``p % S``. So the stream is a function of the seed alone, whatever the
    number of ranks, workers and restarts.

    What it costs:

    - Every worker process reads all lanes of its rank's samples, and drops, undecoded, what other
      workers show: n workers transfer the data n times. Where ``world_size`` divides S, ranks
      read different lanes. Tar shards (:class:`sslkit.data.shards.TarShards`) transfer once.
    - A resumed run reads through what it skips, undecoded: the first pass of a lane, to learn its
      length, and the current one up to the position.
    - Lanes of different lengths end their passes at different times: the epoch of a sample is
      that of its lane, and images of a short lane are shown more often.
    - A broken image is replaced by the next one of its lane that can be read.

    - Images that ``filter`` or ``map`` has decoded are kept decoded in memory. If one of them is
      broken, the stream ends with an error that says how to avoid this.

    Args:
        dataset: a streaming data set. If its features are not known, as after ``map``, its first
            row shows what its columns hold.
        image, label: see :class:`HuggingFaceImages`. Labels that are not a ClassLabel need
            ``num_classes``, or ``class_names`` if they are names; otherwise they are not used. An
            image whose value is not a label (:mod:`sslkit.data.labels`) is unreadable.
        class_names, num_classes: the classes, if the features do not say.
        shuffle: samples in the buffers of all lanes together; they lie in memory, undecoded, in
            each worker (its rank's part).
        max_lanes: how many files are read at a time, at most. A multiple of the number of ranks
            keeps their lanes apart.
        test_fraction: share of the samples that the stream leaves out, on average: those whose
            image has a small hash (:func:`sslkit.data.splits.name_hash`), wherever they lie.
            :meth:`held_out_images` gives them.
        seed: seed of this choice.
        root, places: see :class:`HuggingFaceImages`.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        ValueError: a number is out of range, a column is missing, there are several columns to
            choose from, or the data set has no row.
    """

    def __init__(
        self,
        dataset: "IterableDataset",
        *,
        image: str | None = None,
        label: str | None = None,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        shuffle: int = 4096,
        max_lanes: int = 64,
        test_fraction: float = 0.0,
        seed: int = 0,
        root: str | None = None,
        places: Places | None = None,
        max_side: int = MAX_SIDE,
    ):
        if max_lanes < 1 or shuffle < 1:
            raise ValueError(
                f"max_lanes and shuffle must be at least 1, got {max_lanes} and {shuffle}"
            )
        if test_fraction != 0:
            check_test_fraction(test_fraction)
        table = dataset.features
        if table is None:
            table = next(iter(dataset.with_format(None)), None)
        if table is None:
            raise ValueError("the streaming data set has no row")
        self._columns = Columns(
            table,
            image=image,
            label=label,
            class_names=class_names,
            num_classes=num_classes,
            places=places,
        )
        self._dataset = self._columns.of(dataset)
        self.num_lanes = min(dataset.num_shards, max_lanes)
        self.shuffle = shuffle
        self.test_fraction = test_fraction
        self.seed = seed
        self.root = root
        self.max_side = max_side
        self.num_classes = self._columns.num_classes
        self.class_names = self._columns.class_names

    def reader(self, seed: int) -> "HuggingFaceReader":
        """Read the stream of ``seed``."""
        return HuggingFaceReader(self, seed)

    def held_out_images(self, limit: int = 2000) -> RowsInMemory:
        """The first ``limit`` held-out samples, taken from all lanes in turn, read into memory now.

        About ``limit / test_fraction`` samples are read for them, or the whole data set if it has
        fewer. Images that the data set has encoded stay encoded.

        Raises:
            ValueError: ``test_fraction`` is 0, or no sample is held out.
        """
        if self.test_fraction == 0:
            raise ValueError("this stream holds no sample out; make it with a test_fraction")
        found = self._first_rows(limit, held_out=True)
        if len(found) == 0:
            raise ValueError(
                f"no sample of the stream is held out by test_fraction={self.test_fraction} and "
                f"seed={self.seed}: raise test_fraction, or take another seed"
            )
        return found

    def first_images(self, limit: int) -> RowsInMemory:
        """The first ``limit`` samples that are not held out; see :meth:`held_out_images`."""
        return self._first_rows(limit, held_out=False)

    def _first_rows(self, limit: int, *, held_out: bool) -> RowsInMemory:
        lanes = deque(
            chain.from_iterable(
                self._rows_of(shard, held_out=held_out) for shard in self._lane_shards(lane)
            )
            for lane in range(self.num_lanes)
        )
        rows: list[dict[str, Any]] = []
        while lanes and len(rows) < limit:
            lane = lanes.popleft()
            if row := next(lane, None):
                rows.append(row)
                lanes.append(lane)
        return RowsInMemory(rows, self._columns, root=self.root, max_side=self.max_side)

    def rows(self, seed: int, lane: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Samples of pass ``epoch`` over ``lane``, undecoded, without those that are held out."""
        # Not by IterableDataset.shuffle: its order depends on the version of datasets, and it
        # keeps threads, which wait for seconds at the end of each pass.
        generator = random.Random(sample_seed(seed, lane, epoch))
        shards = self._lane_shards(lane)
        generator.shuffle(shards)
        buffer: list[dict[str, Any]] = []
        size = max(self.shuffle // self.num_lanes, 1)
        for row in chain.from_iterable(self._rows_of(each, held_out=False) for each in shards):
            if len(buffer) < size:
                buffer.append(row)
            else:
                i = generator.randrange(size)
                yield buffer[i]
                buffer[i] = row
        generator.shuffle(buffer)
        yield from buffer

    def decode(self, row: dict[str, Any], name: str) -> tuple[Tensor, int]:
        """The image and label of a row."""
        label = self._columns.label_of(row, name)
        return self._columns.decode(row, name, self.max_side), label

    def _lane_shards(self, lane: int) -> list[int]:
        return list(range(lane, self._dataset.num_shards, self.num_lanes))

    def _shard(self, index: int) -> Iterator[dict[str, Any]]:
        shard = self._dataset.shard(num_shards=self._dataset.num_shards, index=index)
        batches = shard.iter(batch_size=_ROWS_AT_A_TIME)
        # Unlike __iter__, iter() does not deal the files out to the workers of a torch loader.
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # of any type: the user's functions run here too
                raise RuntimeError(
                    f"reading shard {index} of the stream failed: {type(error).__name__}: {error}. "
                    f"If filter or map decodes a broken image, give them undecoded images, so that "
                    f"only this one is lost: .cast_column({self._columns.image!r}, "
                    f"datasets.Image(decode=False)) before them"
                ) from error
            if batch is None:
                return
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def _rows_of(self, shard: int, *, held_out: bool) -> Iterator[dict[str, Any]]:
        for row in self._shard(shard):
            if self._is_held_out(row) == held_out:
                yield row

    def _is_held_out(self, row: dict[str, Any]) -> bool:
        if self.test_fraction == 0:
            return False
        key = cell_key(row.get(self._columns.image), self.root)
        return name_hash(key, self.seed) < self.test_fraction


class HuggingFaceReader:
    """Reads a :class:`HuggingFaceStream`; the positions asked of it must rise."""

    def __init__(self, stream: HuggingFaceStream, seed: int):
        self.stream = stream
        self.seed = seed
        self._lanes: dict[int, _Lane] = {}

    def read(self, position: int) -> StreamItem:
        """Sample number ``position`` of the stream.

        Raises:
            TooManyUnreadable: 64 images of its lane in a row cannot be read.
        """
        item, lane_number = divmod(position, self.stream.num_lanes)
        if lane_number not in self._lanes:
            self._lanes[lane_number] = _Lane(self.stream, self.seed, lane_number, item)
        lane = self._lanes[lane_number]
        lane.advance(item)
        unreadable: list[tuple[int, UnreadableImage]] = []
        for ahead in range(MAX_REPLACEMENTS):
            at = position + ahead * self.stream.num_lanes
            _, row = lane.peek(ahead)
            try:
                image, label = self.stream.decode(row, f"[sample {at} of the stream]")
            except UnreadableImage as error:
                unreadable.append((at, error))
                continue
            return StreamItem(image, label, lane.peek(0)[0], at, tuple(unreadable))
        first = unreadable[0][1]
        raise TooManyUnreadable(
            f"{MAX_REPLACEMENTS} images in a row of lane {lane_number} of the stream are "
            f"unreadable, the first of them {first.name}: {first.reason}"
        )


class _Lane:
    """The rows of a lane from item ``start`` on, with those read ahead for a broken image."""

    def __init__(self, stream: HuggingFaceStream, seed: int, lane: int, start: int):
        self._rows = _endless(stream, seed, lane, start)
        self._next = start
        self._ahead: deque[tuple[int, dict[str, Any]]] = deque()

    def advance(self, item: int) -> None:
        """Drop what comes before ``item``."""
        while self._next < item:
            self.peek(0)
            self._ahead.popleft()
            self._next += 1

    def peek(self, count: int) -> tuple[int, dict[str, Any]]:
        """Epoch and row of the item ``count`` after the current one."""
        while len(self._ahead) <= count:
            self._ahead.append(next(self._rows))
        return self._ahead[count]


def _endless(
    stream: HuggingFaceStream, seed: int, lane: int, start: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Epoch and row of the items of a lane from number ``start`` on."""
    epoch, to_skip = 0, start
    while True:
        length = 0
        for row in stream.rows(seed, lane, epoch):
            length += 1
            if to_skip:
                to_skip -= 1
            else:
                yield epoch, row
        if length == 0:
            raise ValueError(
                f"lane {lane} of the stream has no rows; lower max_lanes or test_fraction"
            )
        epoch += 1 + to_skip // length  # all passes are as long as the one just read
        to_skip %= length
